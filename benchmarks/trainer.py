"""What training costs beside its bare steps: Lightning, the loader, schedules, counters, logging, the checks.

    python -m benchmarks.trainer [--shapes 192x1536x1024 768x12288x4096] [--saes 1 8] [--variant batchtopk]

A run of `python -m train` from a store, with its default paces, is held after every few steps while copies of its SAEs
do as many bare steps (loss, backward, projection, clip, optimizer, renormalisation, the variant's own counters) on the
batches the run just had. So both take turns in one process; figures are medians over the turns, with their quartiles.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.loader import SITE, build
from data.base.cli import CONF, keep_freed_memory
from data.store.store import Store
from train.config import OptimizerSettings
from train.fit import fit
from train.lit import MultiSAEModule
from train.optimizers import optimizer_from
from train.plan import TrainRun
from train.run import TrainRequest, prepare
from train.sae import TrainContext
from train.sae.parts.update import update
from train.sae_trainer import SAETrainer

CHUNK_ROWS = 1024


class Bare:
    """A copy of an SAE in training that does its steps and nothing else."""

    def __init__(self, member: SAETrainer, optimizer: OptimizerSettings) -> None:
        self.sae, self.clip = copy.deepcopy(member.sae), member.clip
        self.dead_F = member.dead.mask(member.dead_after) if member.sae.uses_auxk else None
        self.optimizer = optimizer_from(optimizer)(self.sae.parameters())
        self.optimizer.load_state_dict(copy.deepcopy(member.optimizer.state_dict()))

    def step(self, x_BD: Tensor) -> None:
        step = self.sae.loss(self.sae.norm.normalise(x_BD), TrainContext(dead_F=self.dead_F))
        step.loss.backward()  # type: ignore[no-untyped-call]
        update(self.sae, self.optimizer, self.clip)
        self.optimizer.zero_grad()
        self.sae.after_step(step)


class Turns(Callback):
    """Lets the run and the bare steps take turns of `steps` steps; the first turn warms up."""

    def __init__(self, optimizer: OptimizerSettings, steps: int) -> None:
        self.optimizer, self.steps = optimizer, steps
        self.run_ms: list[float] = []
        self.bare_ms: list[float] = []  # of all SAEs, one after another
        self.fetch_ms: list[float] = []  # of run_ms: between two steps
        self.bare: list[Bare] = []
        self.batches: list[Tensor] = []
        self.fetching = 0.0

    def _now(self, module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.began = self.ended = self._now(module)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.fetching += time.perf_counter() - self.ended

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, _: Any, batch: Tensor, *args: Any) -> None:
        assert isinstance(module, MultiSAEModule)
        self.batches.append(batch)
        if len(self.batches) == self.steps:
            run = (self._now(module) - self.began) / self.steps
            warm = bool(self.bare)
            if not warm:
                self.bare = [Bare(member, self.optimizer) for member in module.members]
            batches = [module.model_units(batch).x_BD for batch in self.batches]
            began = self._now(module)
            for bare in self.bare:
                for x_BD in batches:
                    bare.step(x_BD)
            if warm:
                self.bare_ms.append(1e3 * (self._now(module) - began) / self.steps)
                self.run_ms.append(1e3 * run)
                self.fetch_ms.append(1e3 * self.fetching / self.steps)
            self.batches, self.fetching = [], 0.0
            self.began = self._now(module)
        self.ended = time.perf_counter()


def runs_of(store: Store, folder: Path, saes: int, batch: int, steps: int, overrides: list[str]) -> list[TrainRun]:
    """Return runs of so many steps that differ in their learning rate alone."""
    tokens = batch * steps
    runs = []
    for index in range(saes):
        line = [f"store={store.path}", f"site={SITE}", f"out={folder / str(index)}", f"batch={batch}", *overrides]
        line += [f"tokens={tokens}", f"calibration_tokens={batch}", "heldout_tokens=0", "dead_after=10_000_000"]
        line += [f"optimizer.lr={2e-3 * 0.9**index}", "epochs=1000", "validate_every=1000000"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            settings = OmegaConf.to_container(compose("train", line), resolve=True)
        assert isinstance(settings, dict)
        run = prepare(TrainRequest({str(name): value for name, value in settings.items()}))
        assert run is not None
        runs.append(run)
    return runs


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:8.2f} ({low:.2f} to {high:.2f})"


def compare(store: Store, folder: Path, saes: int, batch: int, args: argparse.Namespace, width: int) -> None:
    """Print one row: the run's step, the bare steps, what lies between."""
    overrides = [f"sae={args.variant}", f"sae.width={width}", f"trainer={args.trainer}", *args.overrides]
    runs = runs_of(store, folder, saes, batch, (args.turns + 1) * args.steps, overrides)
    turns = Turns(runs[0].settings.optimizer, args.steps)
    failed = fit(runs, turns)
    assert not failed, failed
    over = [run - bare for run, bare in zip(turns.run_ms, turns.bare_ms, strict=True)]
    share = [run / bare - 1 for run, bare in zip(turns.run_ms, turns.bare_ms, strict=True)]
    print(
        f"{args.variant} d={runs[0].plan.d_in} F={width} B={batch}, {saes} at once: run {quartiles(turns.run_ms)} ms a "
        f"step, bare steps {quartiles(turns.bare_ms)} ms, over them {quartiles(over)} ms = "
        f"{statistics.median(share):.1%} of the step (ratio {1 + statistics.median(share):.3f}); "
        f"{quartiles(turns.fetch_ms)} ms pass between two steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["192x1536x1024"], help="width x latents x batch")
    parser.add_argument("--saes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--variant", default="batchtopk")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--trainer", default="cpu")
    parser.add_argument("--folder", default="outputs")
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml")
    args = parser.parse_args()
    keep_freed_memory()
    Path(args.folder).mkdir(exist_ok=True)
    for shape in args.shapes:
        d_model, width, batch = map(int, shape.split("x"))
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            store = build(Path(folder), d_model, CHUNK_ROWS, chunks=max(64, 8 * batch // CHUNK_ROWS))
            for saes in args.saes:
                compare(store, Path(folder) / f"{saes}", saes, batch, args, width)


if __name__ == "__main__":
    main()
