"""A pass over the cache under Lightning: prepare its SAEs, fit, calibrate, validate the inference form, save."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers.logger import Logger

from data.base.cpu import has_bf16_units
from data.base.errors import UserError
from train.callbacks import LastCheckpoint, Progress
from train.closing import ranked_lines
from train.config import TrainSettings
from train.cuda_graph import check_capturable
from train.datamodule import ActivationData
from train.lit import MultiSAEModule, OwnReduction, Passes
from train.loggers import CsvLogger, WandbRun
from train.mesh import connect, is_lost_rank
from train.messages import closing, diverged, how_to_go_on, label, missed_l0, opening, slow_bf16
from train.optimizers import optimizer_class, optimizer_from
from train.plan import DataPlan, TrainRun, origin
from train.resume import LAST, fingerprint, first_rank, read_checkpoint, read_tensors
from train.sae import SAE, StartRows, default_window, save
from train.sae.config import PenaltyConfig
from train.sae.parts.init import SAMPLES
from train.sae.parts.ranks import ONE, Mesh
from train.sae.sparse.product import float32_products
from train.sae.variants.batchtopk import BatchTopKBase
from train.sae_trainer import SAETrainer, State
from train.schedules import Schedule
from train.shards import own_state
from train.signals import Signals


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the words of others that say nothing about this run."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # notes on devices and tips
    with warnings.catch_warnings():
        # Lightning 2.6 still makes torch's old LeafSpec (utilities/_pytree.py).
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # A run that was broken off after its last step has no batch left.
        warnings.filterwarnings("ignore", message="Total length of .* across ranks is zero")
        # On a login node of a cluster: that srun is there and not used, which is right for one process.
        warnings.filterwarnings("ignore", message="The `srun` command is available on your system but is not used")
        # From torch 2.9 on a GPU, where Lightning reads the precision of products in the older way.
        warnings.filterwarnings("ignore", message=".*new API settings to control TF32.*", category=UserWarning)
        yield


@_quiet()
def fit(runs: Sequence[TrainRun], *watching: Callback) -> dict[str, str]:
    """Train the SAEs of `runs`, which read one stream, in one pass over it, each into its folder.

    `watching` are called after what watches every pass. Prints what begins and what ends; returns why those failed
    that did, by name.
    """
    with Signals() as signals:
        try:
            return _fit(runs, signals, *watching)
        except (SystemExit, KeyboardInterrupt):  # Lightning answers Ctrl-C with the first
            if first_rank():
                print(how_to_go_on(runs, "interrupted"))
            # The exit code by which a shell knows that a signal ended a program.
            number = signals.received or signal.SIGINT
            raise SystemExit(128 + number) from None
        except OSError:
            if first_rank():
                print(how_to_go_on(runs, "stopped by the error below"), file=sys.stderr)
            raise
        except RuntimeError as error:
            if not is_lost_rank(error):
                raise
            # By each that is left, as the first rank may be the lost one.
            print(how_to_go_on(runs, "another process of this training has ended"), file=sys.stderr)
            raise SystemExit(1) from None


def _fit(runs: Sequence[TrainRun], signals: Signals, *watching: Callback) -> dict[str, str]:
    began = time.monotonic()
    settings, plan = runs[0].settings, runs[0].plan
    data = ActivationData(plan, seed=settings.seed, **settings.loader.model_dump())
    checkpoints = LastCheckpoint(settings.checkpoint_every, settings.checkpoint_minutes, signals)
    trainer = _trainer(settings, plan, checkpoints, _progress(runs), *watching)
    data.trainer = trainer
    mesh = connect(trainer, settings)
    data.ranks = mesh.data
    read = _bytes_read(plan)
    if trainer.is_global_zero:
        print(opening(runs))
    matmul = _matmul(settings.matmul, trainer.strategy.root_device)
    members, failed, order = _members(runs, data, mesh, trainer.strategy.root_device)
    for member in members:
        member.sae.matmul = matmul
    if not members:
        return failed
    # From the member that is furthest behind; the others wait until the stream has come to where they stand.
    stream = Passes(data.train_dataloader, min(member.step for member in members), plan.steps, order)
    rows = data.val_dataloader if len(plan.heldout) else None
    module = MultiSAEModule(
        members, stream, data.model_units, validate_every=settings.validate_every, held_out_rows=rows
    )
    fitting = time.monotonic()
    trainer.fit(module, stream)
    signals.deferring = False
    if signals.received is not None:
        raise KeyboardInterrupt
    waited = round(data.waited / (time.monotonic() - fitting), 4)  # share of the time, for batches
    assert module.step == plan.steps or not module.running
    for member in module.running:
        member.copy_to()
    # After the averaged weights are in place, and before the last validation: T must be that of the weights that are
    # saved.
    with float32_products():
        calibrated = _calibrate(module, data, trainer.strategy.root_device)
    module.validate("final")
    seconds = round(time.monotonic() - began, 1)
    by_name = {run.name: run for run in runs}
    saved = {}
    for member in module.running if mesh.data.rank == 0 else []:  # by all that hold a part of its latents
        record = {"waited": waited, **calibrated.get(member.name, {}), "seconds": seconds}
        saved[member.name] = _save(by_name[member.name], member, record)
    if trainer.is_global_zero:
        for line in ranked_lines(saved):
            print(line)
        shared = f", once for {len(members)} SAEs" if len(members) > 1 else ""
        print(f"read {(_bytes_read(plan) - read) / 1e6:,.1f} MB of the cache{shared}")
    return failed | {member.name: member.failure for member in members if member.failure}


def _bytes_read(plan: DataPlan) -> int:
    return sum(reader.bytes_read for reader in plan.readers.values())


def _members(
    runs: Sequence[TrainRun], data: ActivationData, mesh: Mesh, device: torch.device
) -> tuple[list[SAETrainer], dict[str, str], State | None]:
    """Make the SAEs at their first step or at their checkpoint;
    return also why others could not begin and the loader's state."""
    plan = runs[0].plan
    # One sample for all new SAEs of the pass; none is read where all go on.
    fresh = [run for run in runs if not run.step and not run.settings.start]
    sample = data.sample(SAMPLES) if fresh else None
    members: list[SAETrainer] = []
    failed: dict[str, str] = {}
    order: State | None = None
    for run in runs:
        try:
            member = make_member(run, mesh)
            if run.settings.trainer.cuda_graph:
                check_capturable(member.sae, member.optimizer, device, mesh.size)
                member.use_graphs()
            if mesh.latents.size > 1:
                # Now and not as the fit begins: what its processes tell each other must lie where their messages do.
                member.to(device)
            if run.step:
                order = _go_on(run, member, mesh)["loader"]
            elif not run.settings.start:
                assert sample is not None
                target = None if sample.target_BE is None else StartRows(sample.target_BE, **plan.target_moments())
                with float32_products():
                    member.initialise(sample.x_BD, **plan.moments(), target=target)
            member.loggers = _loggers(run)
        except UserError as error:
            failed[run.name] = str(error)
            if len(runs) > 1 and first_rank():
                print(f"{run.name} is left out: {error}", file=sys.stderr)
        else:
            members.append(member)
    return members, failed, order


def _go_on(run: TrainRun, member: SAETrainer, mesh: Mesh) -> State:
    """Let a member go on from its run's checkpoint, which is returned.

    Of a split dictionary all processes do, or none: one that had no member would leave the others waiting for it.
    """
    split = mesh.latents.size > 1
    refused: UserError | None = None
    state: State = {}
    try:
        state = read_checkpoint(run.folder, run.settings, run.plan, mapped=split)
        place = (run.folder / LAST).parent
        state = own_state(member.sae, state, place, read_tensors, average=member.average is not None)
        member.load(state)
    except UserError as error:
        refused = error
    if split:
        anywhere = mesh.max_(torch.tensor(int(refused is not None), device=member.bad_step.device))
        if bool(anywhere) and refused is None:
            refused = UserError(f"another process cannot read its part of the checkpoint in {run.folder}, and says why")
    if refused is not None:
        raise refused
    return state


def make_member(run: TrainRun, mesh: Mesh = ONE) -> SAETrainer:
    """Make the run's SAE with what trains it, at step 0, on this process of the mesh."""
    settings, plan = run.settings, run.plan
    run.sae.split = mesh.latents  # connected by now
    rate = 1.0
    if settings.lr_at_width is not None:
        # Adam's best rate falls about as the square root of the width (Gao et al. 2406.04093).
        rate = math.sqrt(settings.lr_at_width / run.sae.width)
    return SAETrainer(
        run.sae,
        optimizer_from(settings.optimizer),
        Schedule.of_shares(plan.steps, settings.lr_warmup, settings.lr_decay, settings.sparsity_warmup),
        folder=run.folder,
        name=run.name,
        seed=settings.seed,
        dead_after=settings.dead_after or default_window(plan.tokens),
        clip=settings.clip,
        ema=settings.ema,
        rate=rate,
        log_every=settings.log_every,
        data=mesh.data,
        fingerprint=fingerprint(settings, plan),
    )


def _progress(runs: Sequence[TrainRun]) -> Progress:
    name = label(runs[0].sae) if len(runs) == 1 else f"{len(runs)} SAEs"
    return Progress(name, runs[0].plan.batch * runs[0].plan.world)


def _trainer(settings: TrainSettings, plan: DataPlan, *callbacks: Callback) -> Trainer:
    device = settings.trainer
    if device.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={device.accelerator} finds no GPU here: use trainer.accelerator=cpu")
    if device.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator=mps finds no Apple GPU here: use trainer.accelerator=cpu")
    return Trainer(
        accelerator=device.accelerator,
        devices=device.devices,
        num_nodes=device.num_nodes,
        deterministic=device.deterministic,
        strategy=OwnReduction() if settings.processes > 1 else "auto",
        max_epochs=1,  # the stream of batches goes over the store as often as it takes
        log_every_n_steps=0,  # the members log, so that the other steps cost nothing
        logger=False,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _matmul(setting: str | None, device: torch.device) -> str:
    """Choose the encoder's product: as set, or the device's own;
    on a GPU all others are in tf32 unless it is float32."""
    on_gpu = device.type == "cuda"
    default = "tf32" if on_gpu else "float32"
    matmul = setting or default
    if matmul == "tf32" and not on_gpu:
        raise UserError(f"matmul=tf32 is for a CUDA GPU, and this run is on {device.type}: use matmul=float32 or bf16")
    note = slow_bf16(matmul, device, has_bf16_units())
    if note and first_rank():
        print(note, file=sys.stderr)
    torch.set_float32_matmul_precision("high" if on_gpu and matmul != "float32" else "highest")
    return matmul


def _loggers(run: TrainRun) -> list[Logger]:
    """Make the loggers: metrics.csv, cut where the run goes on, and what `logger` asks for beside it."""
    rows = CsvLogger(run.folder)
    rows.cut(run.step)
    loggers: list[Logger] = [rows]
    logger = run.settings.logger
    if logger.name == "tensorboard":
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(run.folder, name="", version="tensorboard"))
    elif logger.name == "wandb":
        loggers.append(WandbRun(run.folder, logger.project, logger.offline))
    return loggers


def _calibrate(module: MultiSAEModule, data: ActivationData, device: torch.device) -> dict[str, dict[str, Any]]:
    """Set the thresholds and bring L0s to their targets, with frozen weights on rows no optimizer has seen, read once.

    Gives what config.json records of it, by name. Where no row is set aside an L0 stays as training left it.
    """
    module.to(device)  # Lightning ends a fit by moving it to the CPU
    members = [member for member in module.running if member.sae.needs_calibration or _aims(member.sae)]
    rows = data.calibration_loader() if members and data.plan.reserved_rows else ()
    batches = [data.model_units(batch.to(device)).x_BD for batch in rows]
    records: dict[str, dict[str, Any]] = {}
    for member in members:
        sae = member.sae
        if not isinstance(sae, BatchTopKBase):
            found = sae.calibrate_l0(batches, member.data) if batches else None
            if found is not None:
                records[member.name] = {"l0_calibration": asdict(found)}
            continue
        # Recorded beside the calibrated one: how far the two are apart says how well the running mean served.
        followed = float(sae.threshold)
        calibration = asdict(sae.calibrate(batches, member.data))
        records[member.name] = {
            "calibration": calibration,
            "running_threshold": followed,
            "skipped_batches": int(sae.skipped_batches),
        }
    return records


def _aims(sae: SAE) -> bool:
    """Tell whether its penalty was to bring about an L0."""
    return isinstance(sae.config, PenaltyConfig) and sae.config.target_l0 is not None


def _save(run: TrainRun, member: SAETrainer, record: dict[str, Any]) -> dict[str, Any]:
    """Write the SAE with its record, print the line that sums it up and return the record; by all processes that hold
    its latents."""
    training = _training(run, member) | record
    plan = run.plan
    made_of = origin(plan.store, plan.site, plan.target, plan.joined)
    save(member.sae, run.folder, {**made_of, "training": training})
    member.finalize("success")
    if not first_rank():
        return training
    print(closing(member.sae, training, run.folder))
    for warning in (diverged(run, training), missed_l0(member.sae, training)):
        if warning:
            print(warning, file=sys.stderr)
    return training


def _training(run: TrainRun, member: SAETrainer) -> dict[str, Any]:
    """Collect what config.json records: what the run saw, how it ended,
    the inference form's figures on held-out tokens."""
    settings, plan = run.settings, run.plan
    return {
        "tokens": plan.tokens,
        "steps": plan.steps,
        "batch": plan.batch,
        "world": plan.world,
        "seed": settings.seed,
        "optimizer": {"name": optimizer_class(settings.optimizer.name).__name__} | settings.optimizer.arguments(),
        "lr_asked": settings.lr_asked,
        "schedule": asdict(member.schedule),
        "clip": member.clip,
        "ema": settings.ema,
        "lr_at_width": settings.lr_at_width,
        "dead_after": member.dead_after,
        "dead": member.dead_count(),
        "last_step": member.figures_logged,
        "outliers": plan.outliers.record() if plan.outliers else None,  # left out of all that stands here
        "heldout": member.validation,
    }
