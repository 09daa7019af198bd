"""A pass over the cache under Lightning: prepare its SAEs, fit, calibrate, validate what ships, save."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers.logger import Logger

from data.base.errors import UserError
from data.loading.order import mixing_span
from data.store.manifest import TRAIN
from train.callbacks import LastCheckpoint, Progress, clock
from train.datamodule import ActivationData
from train.lit import MultiSAEModule, OwnReduction, Passes
from train.loggers import CsvLogger
from train.plan import LAST, DataPlan, Settings, TrainRun, origin
from train.sae import SAE, default_window, save
from train.sae.parts.init import SAMPLES
from train.sae.variants.batchtopk import BatchTopKBase
from train.sae_trainer import SAETrainer, State
from train.schedules import Schedule
from train.targets import l0_miss


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the words of others that say nothing about this run."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # notes on devices and tips
    with warnings.catch_warnings():
        # Lightning 2.6 still makes torch's old LeafSpec (utilities/_pytree.py).
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # A run that was broken off after its last step has no batch left.
        warnings.filterwarnings("ignore", message="Total length of .* across ranks is zero")
        yield


@_quiet()
def fit(runs: Sequence[TrainRun], *watching: Callback) -> dict[str, str]:
    """Train the SAEs of `runs`, which read one stream, in one pass over it, each into its folder.

    `watching` are called after what watches every pass. Prints what begins and what ends; returns why those failed
    that did, by name.
    """
    began, first = time.monotonic(), runs[0]
    plan = first.plan
    data = ActivationData(plan, seed=first.settings["seed"], **first.settings["loader"])
    checkpoints = LastCheckpoint(first.settings["checkpoint_every"])
    trainer = _trainer(first.settings, plan, checkpoints, _progress(runs), *watching)
    data.trainer = trainer
    read = _bytes_read(plan)
    if trainer.is_global_zero:
        print(_opening(runs))
    matmul = _matmul(first.settings["matmul"], trainer.strategy.root_device)
    members, failed, order = _members(runs, data)
    for member in members:
        member.sae.matmul = matmul
    if not members:
        return failed
    stream = Passes(data.train_dataloader, min(member.step for member in members), plan.steps, order)
    rows = data.val_dataloader if len(plan.heldout) else None
    module = MultiSAEModule(
        members, stream, data.model_units, validate_every=first.settings["validate_every"], held_out_rows=rows
    )
    fitting = time.monotonic()
    try:
        trainer.fit(module, stream)
        waited = round(data.waited / (time.monotonic() - fitting), 4)  # share of the time, for batches
        assert module.step == plan.steps or not module.running
        for member in module.running:
            member.copy_to()
        found = _calibrate(module, data, trainer.strategy.root_device)
        module.validate("final")
    except (SystemExit, KeyboardInterrupt):  # Lightning's answer to Ctrl-C is the first
        if trainer.is_global_zero:
            print(_interrupted(runs))
        raise SystemExit(1) from None
    if trainer.is_global_zero:
        seconds = round(time.monotonic() - began, 1)
        by_name = {run.name: run for run in runs}
        for member in module.running:
            _keep(by_name[member.name], member, {"waited": waited, **found.get(member.name, {}), "seconds": seconds})
        shared = f", once for {len(members)} SAEs" if len(members) > 1 else ""
        print(f"read {(_bytes_read(plan) - read) / 1e6:,.1f} MB of the cache{shared}")
    return failed | {member.name: member.failure for member in members if member.failure}


def _bytes_read(plan: DataPlan) -> int:
    return sum(reader.bytes_read for reader in plan.readers.values())


def _members(runs: Sequence[TrainRun], data: ActivationData) -> tuple[list[SAETrainer], dict[str, str], State | None]:
    """The SAEs at their first step or at their checkpoint, why others could not begin, and the loader's state."""
    plan = runs[0].plan
    fresh = [run for run in runs if not run.step and not run.settings["start"]]
    sample_ND = data.sample(SAMPLES) if fresh else None
    members: list[SAETrainer] = []
    failed: dict[str, str] = {}
    order: State | None = None
    for run in runs:
        try:
            member = _member(run)
            if run.step:
                state = torch.load(run.folder / LAST, map_location="cpu", weights_only=True)
                member.load(state)
                order = state["loader"]
            elif not run.settings["start"]:
                assert sample_ND is not None
                member.initialise(sample_ND, **plan.moments())
            member.loggers = _loggers(run, len(runs) > 1)
        except UserError as error:
            failed[run.name] = str(error)
        else:
            members.append(member)
    return members, failed, order


def label(sae: SAE) -> str:
    """The variant and what it aims at, in a few letters."""
    return f"{sae.name} {sae.config.aim}"


def _member(run: TrainRun) -> SAETrainer:
    settings, plan = run.settings, run.plan
    shares = {name: settings[name] for name in ("lr_warmup", "lr_decay", "sparsity_warmup")}
    return SAETrainer(
        run.sae,
        instantiate(settings["optimizer"]),
        Schedule.of_shares(plan.steps, **shares),
        folder=run.folder,
        name=run.name,
        seed=settings["seed"],
        dead_after=settings["dead_after"] or default_window(plan.tokens),
        clip=settings["clip"],
        ema=settings["ema"],
        rate=math.sqrt(settings["lr_at_width"] / run.sae.width) if settings["lr_at_width"] else 1.0,
        log_every=settings["log_every"],
        world=plan.world,
    )


def _progress(runs: Sequence[TrainRun]) -> Progress:
    name = label(runs[0].sae) if len(runs) == 1 else f"{len(runs)} SAEs"
    return Progress(name, runs[0].plan.batch * runs[0].plan.world)


def _trainer(settings: Settings, plan: DataPlan, *callbacks: Callback) -> Trainer:
    device = settings["trainer"]
    if device["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={device['accelerator']} finds no GPU here: use trainer.accelerator=cpu")
    return Trainer(
        **device,
        strategy=OwnReduction() if plan.world > 1 else "auto",
        max_epochs=1,  # the stream of batches goes over the store as often as it takes
        log_every_n_steps=0,  # the members log, so that the other steps cost nothing
        logger=False,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _matmul(asked: str | None, device: torch.device) -> str:
    """The encoder's product as asked, or the device's own; on a GPU all others are in tf32 unless it is float32."""
    on_gpu = device.type == "cuda"
    found = asked or ("tf32" if on_gpu else "float32")
    if found == "tf32" and not on_gpu:
        raise UserError(f"matmul=tf32 is for a CUDA GPU, and this run is on {device.type}: use matmul=float32 or bf16")
    torch.set_float32_matmul_precision("high" if on_gpu and found != "float32" else "highest")
    return found


def _loggers(run: TrainRun, shared: bool) -> list[Logger]:
    """metrics.csv, cut where the run goes on, and what `logger` asks for beside it."""
    rows = CsvLogger(run.folder)
    rows.cut(run.step)
    loggers: list[Logger] = [rows]
    asked = run.settings["logger"]
    if asked["name"] == "tensorboard":
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(run.folder, name="", version="tensorboard"))
    elif asked["name"] == "wandb":
        if shared:
            raise UserError(
                "logger=wandb keeps one run a process and would mix the SAEs of a pass: add hydra/launcher=basic, "
                "which trains one after another, or take another logger"
            )
        from pytorch_lightning.loggers import WandbLogger

        name, project = run.folder.name, asked["project"]
        loggers.append(WandbLogger(name=name, save_dir=run.folder, project=project, offline=asked["offline"]))
    return loggers


def _calibrate(module: MultiSAEModule, data: ActivationData, device: torch.device) -> dict[str, dict[str, Any]]:
    """Settle the thresholds, where there are any, with frozen weights on rows no optimizer has seen, read once."""
    module.to(device)  # Lightning ends a fit by moving it to the CPU
    members = [member for member in module.running if isinstance(member.sae, BatchTopKBase)]
    batches = [data.model_units(batch.to(device)) for batch in data.calibration_loader()] if members else []
    found = {}
    for member in members:
        sae = member.sae
        assert isinstance(sae, BatchTopKBase)
        followed = float(sae.threshold)
        calibration = asdict(sae.calibrate(batches))
        skipped = int(sae.skipped_batches)
        found[member.name] = {
            "calibration": calibration,
            "running_threshold": followed,
            "skipped_batches": skipped,
        }
    return found


def _keep(run: TrainRun, member: SAETrainer, found: dict[str, Any]) -> None:
    """Write the SAE with its record, and print the line that sums it up."""
    training = _training(run, member) | found
    save(member.sae, run.folder, {**origin(run.plan.store, run.plan.site), "training": training})
    member.finalize("success")
    print(_closing(member.sae, training, run.folder))
    if (missed := _missed(member.sae, training)) is not None:
        print(missed)


def _training(run: TrainRun, member: SAETrainer) -> dict[str, Any]:
    """What config.json keeps: what the run saw, how it ended, how the form that ships does on held-out tokens."""
    settings, plan = run.settings, run.plan
    return {
        "tokens": plan.tokens,
        "steps": plan.steps,
        "batch": plan.batch,
        "world": plan.world,
        "seed": settings["seed"],
        "optimizer": _named(settings["optimizer"]),
        "lr_asked": settings["lr_asked"],
        "schedule": asdict(member.schedule),
        "clip": member.clip,
        "ema": settings["ema"],
        "lr_at_width": settings["lr_at_width"],
        "dead_after": member.dead_after,
        "dead": member.dead_count(),
        "last_step": member.figures_logged,
        "outliers": asdict(plan.outliers) if plan.outliers else None,  # left out of all that stands here
        "heldout": member.validation,
    }


def _named(optimizer: Settings) -> dict[str, Any]:
    """The optimizer's settings with its name for its import path."""
    name = str(optimizer["_target_"]).rsplit(".", 1)[-1]
    return {"name": name} | {key: value for key, value in optimizer.items() if not key.startswith("_")}


def _opening(runs: Sequence[TrainRun]) -> str:
    """What begins, on what; of several SAEs each in a line of its own."""
    settings, plan = runs[0].settings, runs[0].plan
    rows = int(plan.readers[TRAIN].sizes[: plan.stored_chunks].sum())
    span = mixing_span(plan.store.layout.unit_rows, settings["loader"]["pool_chunks"], rows)
    read = (
        f"{plan.tokens:,} tokens in {plan.steps:,} steps from {plan.store.path} {plan.site} "
        f"({rows:,} rows, mixed over {span:,.0f})"
    )
    told = [f"{label(run.sae)}: width {run.sae.width}" for run in runs]
    verbs = [f"going on from step {run.step:,}" if run.step else "training" for run in runs]
    if len(runs) == 1:
        return f"{'going on with' if runs[0].step else 'training'} {told[0]}, {read}"
    lines = [f"  {run.name}  {what}, {verb}" for run, what, verb in zip(runs, told, verbs, strict=True)]
    return "\n".join([f"{len(runs)} SAEs in one pass: {read}", *lines])


def _interrupted(runs: Sequence[TrainRun]) -> str:
    """How to go on."""
    kept = [run.folder for run in runs if (run.folder / LAST).exists()]
    if not kept:
        return "interrupted before the first checkpoint"
    alone = f"python -m train resume={kept[0]}"
    if runs[0].sweep is None:
        return f"interrupted; go on from the last checkpoint with: {alone}"
    return (
        f"interrupted; the same sweep with hydra.sweep.dir={runs[0].sweep} goes on from the last checkpoints"
        f" (or one of its SAEs alone: {alone})"
    )


def _missed(sae: SAE, training: dict[str, Any]) -> str | None:
    """What to say of an L0 that is not the one asked for; None where it is, or none was."""
    asked = sae.config.wanted_l0
    if asked is None:
        return None
    last, calibration = training["last_step"], training.get("calibration")
    return l0_miss(
        sae.name,
        asked,
        (training["heldout"] or calibration or last)["l0"],
        trained=(calibration or last)["l0"],
        calibrated=calibration is not None,
        coefficient=last.get("coefficient"),
    )


def _closing(sae: SAE, training: dict[str, Any], folder: Path) -> str:
    held_out = training["heldout"]
    figures = ""
    if held_out:
        figures = f"  NMSE {held_out['nmse']:.4f}  L0 {held_out['l0']:.1f} on {held_out['tokens']:,.0f} held-out tokens"
    if "calibration" in training:
        calibration = training["calibration"]
        figures += f"  threshold {calibration['threshold']:.4g} (L0 {calibration['l0']:.1f} on the calibration rows)"
    return (
        f"{label(sae)}  width {sae.width}  {training['tokens']:,} tokens{figures}"
        f"  dead {training['dead']}  {clock(training['seconds'])}"
        f"  waited {training['waited']:.1%} for data  -> {folder}"
    )
