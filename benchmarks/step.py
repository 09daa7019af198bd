"""What a training step costs, beside other libraries' steps and beside the least it can cost, in ratios of one run.

    python -m benchmarks.step --variants batchtopk --batches 4096 --dead 0     # minutes; needs `make peers`
    python -m benchmarks.step --only ours sparse-floor --variants topk         # without peers
    python -m benchmarks.step --report                                         # all that --out holds, and the goals

Each contestant lives in a process of its own (the peers' in their own environment) and steps when asked, so that they
take turns on a quiet machine: --steps of each make a round, their order rotates, ratios are medians over rounds. All
get the same float32 batches with E||x||^2 = D, learning rate 1e-9 (activity and dead latents stay as set) and their
own defaults otherwise. A dead latent's encoder row is made small so that it never fires, and its counter says that it
has not for long; that AuxK then ran, on so many latents, is checked. Of relu, gated and jumprelu one bias or threshold
for all latents, measured on 256 tokens, sets L0. Memory is the peak above what the process held before its SAE was
made. Every cell is added to --out, which a later call extends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contestants.process import DENSE, ENTRIES, FLOOR, Failed, Process
from benchmarks.contestants.spec import SELECTING, VARIANTS, Spec
from benchmarks.contestants.table import Cell, Row, goals, show
from data.loading.loader import ActivationLoader
from data.loading.reader import open_reader
from data.store.manifest import TRAIN
from data.store.store import Store

POOL = 4  # batches, taken in turn
SLOW = 20.0  # seconds a step: such a contestant takes part in the first round only


def mixture(batch: int, d_model: int) -> Tensor:
    """Return batches [POOL, B, D] of a mixture of 1024 Gaussians, the mean squared norm D."""
    generator = torch.Generator().manual_seed(0)
    centres_CD = torch.randn(1024, d_model, generator=generator)
    which = torch.randint(1024, (POOL, batch), generator=generator)
    noise = torch.randn(POOL, batch, d_model, generator=generator)
    return (centres_CD[which] + noise) / 2**0.5


def harvested(folder: Path, site: str, batch: int) -> Tensor:
    """Return the first batches [POOL, B, D] of a store in the loader's order, scaled to the mean squared norm D."""
    loader = ActivationLoader(open_reader(Store.open(folder), TRAIN, site), batch=batch)
    x = torch.stack([rows.float() for rows, _ in zip(loader, range(POOL), strict=False)])
    return x * (x.shape[-1] / x.square().sum(-1).mean()).sqrt()


def failing(spec: Spec, name: str, facts: dict[str, float]) -> str | None:
    """Return why a contestant did not do the work asked for, or None."""
    if name in (FLOOR, DENSE):
        return None
    if not 0.8 * spec.activity <= facts["l0"] <= 1.25 * spec.activity:
        return f"its L0 is {facts['l0']:.1f}, not about {spec.activity:g}"
    expected = len(spec.dead_latents())
    if facts["dead"] != expected:
        return f"{facts['dead']:.0f} latents count as dead, not {expected}"
    if spec.variant in SELECTING and (facts["auxk"] > 0) != (expected > 0):
        return f"its AuxK is {facts['auxk']} with {expected} dead latents"
    return None


class Round:
    """The contestants of one cell, alive side by side."""

    def __init__(self, spec: Spec, names: list[str], rounds: int, steps: int) -> None:
        self.spec, self.rounds, self.steps = spec, rounds, steps
        self.rows: dict[str, Row] = {name: {"ms": [], "steps": steps} for name in names}

    def _running(self) -> list[str]:
        return [name for name, row in self.rows.items() if "failed" not in row]

    def warm(self, processes: dict[str, Process]) -> None:
        """Take a first step of each when all are ready, a second of the fast."""
        for name, process in processes.items():
            try:
                process.ready()
            except Failed as error:
                self.rows[name] = {"failed": str(error)}
        for name in self._running():
            try:
                seconds = processes[name].run(1)["seconds"]
                if seconds < SLOW or self.spec.device != "cpu":  # a GPU's first step compiles kernels
                    seconds = processes[name].run(1)["seconds"]
            except Failed as error:
                self.rows[name] = {"failed": str(error)}
            else:
                self.rows[name]["slow"] = seconds > SLOW

    def turn(self, index: int, processes: dict[str, Process]) -> None:
        running = self._running()
        for name in running[index % len(running) :] + running[: index % len(running)]:
            row = self.rows[name]
            if index and row["slow"]:
                continue
            answer = processes[name].run(self.steps)
            row["ms"].append(1e3 * answer["seconds"] / self.steps)
            row |= {"peak_mb": answer["peak_mb"], "device_mb": answer["device_mb"]}

    def measure(self, processes: dict[str, Process]) -> dict[str, Row]:
        self.warm(processes)
        for index in range(self.rounds if self._running() else 0):
            self.turn(index, processes)
        for name in self._running():
            facts = processes[name].facts()
            why = failing(self.spec, name, facts)
            self.rows[name] = {"failed": why} if why else self.rows[name] | {"facts": facts}
        return self.rows


def measured(spec: Spec, batches: Tensor, names: list[str], args: argparse.Namespace) -> Cell:
    """Return one cell of the table."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "batches.pt"
        torch.save(batches, path)
        processes = {}
        for name in names:
            peer = ENTRIES[name].peer
            python, kept = (args.peers_python, args.allocator == "ours") if peer else (Path(sys.executable), False)
            process = Process(name, spec, path, python=python, threads=args.threads, kept=kept)
            processes[name] = stack.enter_context(process)
        rows = Round(spec, names, args.rounds, args.steps).measure(processes)
    on_gpu = torch.device(spec.device).type == "cuda"
    place = {
        "machine": torch.cuda.get_device_name(spec.device) if on_gpu else "CPU",
        "threads": args.threads,
        "torch": torch.__version__,
        "allocator": args.allocator,
    }
    return {"spec": asdict(spec), **place, "rows": rows}


def specs(args: argparse.Namespace, d_model: int) -> Iterator[Spec]:
    for variant, batch, dead in product(args.variants, args.batches, args.dead):
        yield Spec(
            variant,
            d_model,
            args.width,
            args.k,
            batch,
            dead=dead,
            l0=args.l0,
            device=args.device,
            precision=args.precision,
        )


def stored(path: Path) -> list[Cell]:
    return list(json.loads(path.read_text())) if path.exists() else []


def keep(path: Path, cell: Cell) -> None:
    """Add a cell to the file, in place of one of the same spec on the same machine."""
    same = ("spec", "machine", "threads", "allocator")
    cells = [old for old in stored(path) if any(old[key] != cell[key] for key in same)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*cells, cell], indent=1))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The training step beside other libraries' and beside its floors.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--dead", nargs="+", type=float, default=[0.0, 0.2], help="shares of dead latents")
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), default=list(ENTRIES), help="contestants")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--width", type=int, default=12_288)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--l0", type=float, default=100.0, help="of relu, gated and jumprelu")
    parser.add_argument("--store", type=Path, help="the folder of a store, for harvested activations; sets d")
    parser.add_argument("--site", help="of the store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each contestant in a round; on a GPU take 20 or more")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contestant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32", help="of products")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"), help="`make peers`")
    parser.add_argument(
        "--allocator", choices=["own", "ours"], default="own", help="ours: peers keep freed memory as our stages do"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/step.json"))
    parser.add_argument("--report", action="store_true", help="print what --out holds, measure nothing")
    args = parser.parse_args()
    if not args.report and any(ENTRIES[name].peer for name in args.only) and not args.peers_python.exists():
        parser.error(f"{args.peers_python} is missing: run `make peers`, or name contestants without peers in --only")
    if args.precision == "tf32" and torch.device(args.device).type != "cuda":
        parser.error("--precision tf32 is for a GPU: add --device cuda")
    if (args.store is None) != (args.site is None):
        parser.error("--store and --site go together")
    return args


def main() -> None:
    args = parsed()
    if args.report:
        print("\n\n".join(show(cell) for cell in stored(args.out)))
        print("\n" + "\n".join(goals(stored(args.out))))
        return
    for batch in args.batches:
        batches = harvested(args.store, args.site, batch) if args.store else mixture(batch, args.d_model)
        for spec in specs(argparse.Namespace(**{**vars(args), "batches": [batch]}), batches.shape[-1]):
            names = [name for name in args.only if spec.variant in ENTRIES[name].variants]
            cell = measured(spec, batches, names, args)
            keep(args.out, cell)
            print("\n".join([show(cell), *goals([cell])]), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
