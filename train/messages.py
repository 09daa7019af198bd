"""What a training says: what begins, how to go on after an interruption, what a finished run came to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.base.clock import clock
from data.loading.order import mixing_span
from data.store.manifest import TRAIN
from train.plan import TrainRun
from train.resume import LAST, read_checkpoint
from train.sae import SAE
from train.targets import l0_miss

LARGE_MEAN = 0.8  # of E||x||^2; at 0.94 ReLU and JumpReLU were seen to collapse, at 0.34 and below not


def label(sae: SAE) -> str:
    """Name the variant and what it aims at, in a few letters."""
    return f"{sae.name} {sae.config.aim}"


def opening(runs: Sequence[TrainRun]) -> str:
    """Say what begins, on what; of several SAEs each in a line of its own."""
    settings, plan = runs[0].settings, runs[0].plan
    rows = int(plan.readers[TRAIN].sizes[: plan.stored_chunks].sum())
    sites = plan.site if plan.target is None else f"{plan.site} -> {plan.target}"
    span = mixing_span(plan.store.layout.unit_rows, settings.loader.pool_chunks, rows)
    read = (
        f"{plan.tokens:,} tokens in {plan.steps:,} steps from {plan.store.path} {sites} "
        f"({rows:,} rows, mixed over {span:,.0f})"
    )
    lines = []
    if len(runs) == 1:
        verb = f"going on from step {runs[0].step:,} with" if runs[0].step else "training"
        lines.append(f"{verb} {label(runs[0].sae)}: width {runs[0].sae.width}, {read}")
    else:
        lines.append(f"{len(runs)} SAEs in one pass: {read}")
        for run in runs:
            verb = f"going on from step {run.step:,}" if run.step else "training"
            lines.append(f"  {run.name}  {label(run.sae)}: width {run.sae.width}, {verb}")
    if plan.outliers:
        left_out = ", ".join(f"{count:,} of {split}" for split, count in plan.outliers.left_out.items())
        where = "" if plan.target is None else f" at {plan.site} or {plan.target}"
        lines.append(
            f"rows above {plan.outliers.times:g} times the median norm{where} are left out ({left_out}): "
            "outliers=null keeps them"
        )
    moments = plan.moments()
    share = 1 - moments["variance"] / moments["mean_sq_norm"]
    uncentred = [run.name for run in runs if run.sae.encoder_centre is None]
    if share > LARGE_MEAN and uncentred:
        lines.append(
            f"the mean holds {share:.0%} of the activations' squared norm, and {', '.join(uncentred)} may lose most "
            "latents to it, as the encoder reads it: give sae.apply_b_dec_to_input=true"
        )
    if settings.trainer.latent_ranks > 1:
        lines.append(f"{settings.trainer.latent_ranks} processes hold the latents of one dictionary, each a part")
    return "\n".join(lines)


def how_to_go_on(runs: Sequence[TrainRun], why: str) -> str:
    """Say from which step the runs go on, and the command that does it."""
    saved = [run for run in runs if (run.folder / LAST).exists()]
    if not saved:
        return f"{why} before the first step was saved: begin again with the same command"
    first = saved[0]
    step, total = read_checkpoint(first.folder, first.settings, first.plan, mapped=True)["step"], first.plan.steps
    command = f'make train ARGS="resume={first.folder}"'
    if first.settings.processes > 1:
        nodes = f"--nnodes {first.settings.trainer.num_nodes} " if first.settings.trainer.num_nodes > 1 else ""
        ranks = f"{nodes}--nproc-per-node {first.settings.trainer.devices}"
        command = f"torchrun {ranks} -m train resume={first.folder}"
    if first.sweep is None:
        return f"{why}; step {step:,} of {total:,} is saved, go on from there with: {command}"
    return (
        f"{why}; step {step:,} of {total:,} is saved, go on from there with the same command and "
        f"hydra.sweep.dir={first.sweep} (or one SAE alone: {command})"
    )


def closing(sae: SAE, training: dict[str, Any], folder: Path) -> str:
    """Write the line that sums up a finished run."""
    held_out = training["heldout"]
    figures = ""
    if held_out:
        figures = f"  NMSE {held_out['nmse']:.4f}  L0 {held_out['l0']:.1f} on {held_out['tokens']:,.0f} held-out tokens"
    if "calibration" in training:
        calibration = training["calibration"]
        figures += f"  threshold {calibration['threshold']:.4g} (L0 {calibration['l0']:.1f} on the calibration rows)"
    if "l0_calibration" in training:
        figures += f"  ({training['l0_calibration']['before']:.1f} before calibration)"
    return (
        f"{label(sae)}  width {sae.width}  {training['tokens']:,} tokens{figures}"
        f"  dead {training['dead']}  {clock(training['seconds'])}"
        f"  waited {training['waited']:.1%} for data  -> {folder}"
    )


def diverged(run: TrainRun, training: dict[str, Any]) -> str | None:
    """Write a sentence for a run that ends worse than the mean of the activations would do, else None."""
    figures = training["heldout"] or training["last_step"]
    nmse = figures.get("nmse")
    if nmse is None or nmse <= 1:
        return None
    return (
        f"{run.name} diverged: its NMSE of {nmse:.3g} is above 1, which the mean alone reaches: lower optimizer.lr "
        f"({run.settings.optimizer.lr:g}) or lengthen lr_warmup"
    )


def missed_l0(sae: SAE, training: dict[str, Any]) -> str | None:
    """Say that the L0 is not the one asked for, and what to do; None where it is, or none was asked for."""
    target = sae.config.wanted_l0
    if target is None:
        return None
    last, moved = training["last_step"], training.get("l0_calibration")
    calibration = training.get("calibration", moved)
    return l0_miss(
        sae.name,
        target,
        (training["heldout"] or calibration or last)["l0"],
        trained=(calibration or last)["l0"],
        calibrated=calibration is not None,
        before=None if moved is None else moved["before"],
        coefficient=last.get("coefficient"),
    )


def slow_bf16(matmul: str, device: torch.device, units: bool) -> str | None:
    """Say that matmul=bf16 saves no time on a CPU without `units` for it, where that is so."""
    if matmul != "bf16" or device.type != "cpu" or units:
        return None
    return (
        "matmul=bf16 rounds as asked but saves no time: this CPU has neither AMX nor AVX512-BF16, so matmul=float32 is "
        "as fast and more precise"
    )
