"""One training run under Lightning: prepare, fit, calibrate, validate what ships, save."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from pytorch_lightning import Trainer
from pytorch_lightning.loggers.logger import Logger

from data.errors import UserError
from data.manifest import TRAIN
from data.order import mixing_span
from train.callbacks import DurableCheckpoints, LastCheckpoint, Progress, clock
from train.datamodule import ActivationData
from train.lit import LitSAE
from train.loggers import CsvLogger
from train.plan import LAST, Plan, Settings
from train.sae import SAE, default_window, save
from train.sae.batchtopk import BatchSelected
from train.sae.init import SAMPLES
from train.schedules import Schedule


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the words of others that say nothing about this run."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # notes on devices and tips
    with warnings.catch_warnings():
        # Lightning 2.6 still makes torch's old LeafSpec (utilities/_pytree.py).
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        yield


@_quiet()
def fit(settings: Settings, plan: Plan, sae: SAE, folder: Path, *, going_on: bool) -> str:
    """Train `sae` as `plan` says into `folder`, from its last checkpoint where `going_on`; returns the closing line."""
    began = time.monotonic()
    torch.manual_seed(settings["seed"])
    data = ActivationData(plan, seed=settings["seed"], **settings["loader"])
    module = _module(settings, plan, sae)
    trainer = _trainer(settings, plan, folder, Progress(_label(sae), plan.batch * plan.world))
    if trainer.is_global_zero:
        print(_opening(settings, plan, sae, going_on))
    if not going_on:
        sae.initialise(data.sample(SAMPLES), **plan.moments(), seed=settings["seed"])
    fitting = time.monotonic()
    try:
        trainer.fit(module, data, ckpt_path=folder / LAST if going_on else None, weights_only=True)
    except SystemExit:  # Lightning's answer to Ctrl-C
        if (folder / LAST).exists():
            print(f"interrupted; go on from the last checkpoint with: python -m train resume={folder}")
        raise
    waited = {"waited": round(data.waited / (time.monotonic() - fitting), 4)}  # share of the time, for batches
    found = _calibrate(sae, data, trainer.strategy.root_device)
    if len(plan.heldout):
        trainer.validate(module, data, verbose=False)
    if not trainer.is_global_zero:
        return ""
    training = _training(settings, plan, module) | waited | found | {"seconds": round(time.monotonic() - began, 1)}
    save(sae, folder, _record(plan, training))
    return _closing(sae, training, folder)


def _label(sae: SAE) -> str:
    asked = ((name, getattr(sae, name, None)) for name in ("k", "sparsity"))
    target = next((f" {name}={value:g}" for name, value in asked if value is not None), "")
    return f"{sae.name}{target}"


def _module(settings: Settings, plan: Plan, sae: SAE) -> LitSAE:
    shares = {name: settings[name] for name in ("lr_warmup", "lr_decay", "sparsity_warmup")}
    return LitSAE(
        sae,
        instantiate(settings["optimizer"]),
        Schedule.of_shares(plan.steps, **shares),
        dead_after=settings["dead_after"] or default_window(plan.tokens),
        clip=settings["clip"],
        log_every=settings["log_every"],
    )


def _trainer(settings: Settings, plan: Plan, folder: Path, progress: Progress) -> Trainer:
    device = settings["trainer"]
    if device["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={device['accelerator']} finds no GPU here: use trainer.accelerator=cpu")
    return Trainer(
        **device,
        max_steps=plan.steps,
        max_epochs=-1,
        limit_val_batches=1.0 if len(plan.heldout) else 0,
        val_check_interval=settings["validate_every"],
        check_val_every_n_epoch=None,  # validation counts steps over all epochs
        num_sanity_val_steps=0,
        log_every_n_steps=0,  # LitSAE logs, so that the other steps cost nothing
        logger=_loggers(settings, folder),
        callbacks=[LastCheckpoint(folder / LAST, settings["checkpoint_every"]), progress],
        plugins=[DurableCheckpoints()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _loggers(settings: Settings, folder: Path) -> list[Logger]:
    loggers: list[Logger] = [CsvLogger(folder)]
    asked = settings["logger"]
    if asked["name"] == "tensorboard":
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    elif asked["name"] == "wandb":
        from pytorch_lightning.loggers import WandbLogger

        loggers.append(
            WandbLogger(name=folder.name, save_dir=folder, project=asked["project"], offline=asked["offline"])
        )
    return loggers


def _calibrate(sae: SAE, data: ActivationData, device: torch.device) -> dict[str, Any]:
    """Settle the threshold, where there is one, with frozen weights on rows the optimizer has not seen."""
    if not isinstance(sae, BatchSelected):
        return {}
    sae.to(device)
    followed = float(sae.threshold)
    found = sae.calibrate([data.decode(batch.to(device)) for batch in data.calibration_loader()])
    skipped = int(sae.skipped_batches)
    return {"calibration": asdict(found), "running_threshold": followed, "skipped_batches": skipped}


def _training(settings: Settings, plan: Plan, module: LitSAE) -> dict[str, Any]:
    """What config.json keeps: what the run saw, how it ended, how the form that ships does on held-out tokens."""
    return {
        "tokens": plan.tokens,
        "steps": plan.steps,
        "batch": plan.batch,
        "world": plan.world,
        "seed": settings["seed"],
        "optimizer": _named(settings["optimizer"]),
        "schedule": asdict(module.schedule),
        "clip": module.clip,
        "dead_after": module.dead_after,
        "dead": int(module.dead.mask(module.dead_after).sum()),
        "last_step": module.figures_logged,
        "outliers": asdict(plan.outliers) if plan.outliers else None,  # left out of all that stands here
        "heldout": module.validation,
    }


def _named(optimizer: Settings) -> dict[str, Any]:
    """The optimizer's settings with its name for its import path."""
    name = str(optimizer["_target_"]).rsplit(".", 1)[-1]
    return {"name": name} | {key: value for key, value in optimizer.items() if not key.startswith("_")}


def _record(plan: Plan, training: dict[str, Any]) -> dict[str, Any]:
    manifest = plan.store.manifest
    names = {"site": plan.site, "fingerprint": manifest.fingerprint, "store": manifest.folder}
    return {**names, "model": manifest.settings["model"], "training": training}


def _opening(settings: Settings, plan: Plan, sae: SAE, going_on: bool) -> str:
    rows = int(plan.readers[TRAIN].sizes[: plan.stored_chunks].sum())
    span = mixing_span(plan.store.layout.unit_rows, settings["loader"]["pool_chunks"], rows)
    return (
        f"{'going on with' if going_on else 'training'} {_label(sae)}: width {sae.width}, {plan.tokens:,} tokens in "
        f"{plan.steps:,} steps from {plan.store.path} {plan.site} ({rows:,} rows, mixed over {span:,.0f})"
    )


def _closing(sae: SAE, training: dict[str, Any], folder: Path) -> str:
    held_out = training["heldout"]
    figures = ""
    if held_out:
        figures = f"  NMSE {held_out['nmse']:.4f}  L0 {held_out['l0']:.1f} on {held_out['tokens']:,.0f} held-out tokens"
    if "calibration" in training:
        figures += f"  threshold {training['calibration']['threshold']:.4g}"
    return (
        f"{_label(sae)}  width {sae.width}  {training['tokens']:,} tokens{figures}"
        f"  dead {training['dead']}  {clock(training['seconds'])}"
        f"  waited {training['waited']:.1%} for data  -> {folder}"
    )
