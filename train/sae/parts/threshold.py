"""Thresholds: that of BatchTopK's inference form, and the level at which a wanted L0 is met after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from train.sae.parts.ranks import ONE, Mesh, kth_largest
from train.sae.sparse.cpu import select
from train.sae.sparse.rules import TopOfBatch

_PART_ENTRIES = 1 << 28  # of a matrix that is made several times over when a level is looked for


def running_mean_(mean: Tensor, weight: Tensor, value: Tensor, decay: float) -> None:
    """Take `value`, where it is above 0, into the bias-corrected exponential mean of all values so far.

    mean_n = sum_i (1 - decay) decay^(n - i) v_i / w_n, w_n = 1 - decay^n: right from the first value on. `weight`
    holds w_n.
    """
    # torch.where, not `if`: reading the value would make the host wait for a GPU in each step.
    seen = value > 0
    new_weight = decay * weight + (1 - decay)
    new_mean = mean + (1 - decay) / new_weight * (value - mean)
    mean.copy_(torch.where(seen, new_mean, mean))
    weight.copy_(torch.where(seen, new_weight, weight))


@dataclass(frozen=True)
class Calibration:
    """What the calibration of a threshold found.

    threshold: T, the mean over batches of the smallest positive value kept.
    threshold_k: T_k, the (k * N)-th largest z of the set (0 where fewer are positive). l0: mean number of z > T a
    token. batches, skipped: those used, and those with fewer than k * B positives. tokens: N.
    """

    threshold: float
    threshold_k: float
    l0: float
    batches: int
    skipped: int
    tokens: int


def _total(count: int, mesh: Mesh, like: Tensor) -> int:
    """Add up a number over the mesh."""
    return int(mesh.sum_(torch.tensor(count, device=like.device)))


def _kth(values_n: Tensor, k: int, mesh: Mesh) -> Tensor:
    """Find the k-th largest of all values over the mesh."""
    if mesh.size > 1:
        return kth_largest(values_n, k, mesh)
    return values_n.kthvalue(values_n.numel() - k + 1).values


def _smallest_kept(z_BF: Tensor, k: int, mesh: Mesh) -> float:
    """Find the (k * B)-th largest z of a batch over the mesh, 0 where fewer are positive."""
    count = k * len(z_BF) * mesh.data.size
    values_n = select(TopOfBatch(min(count, z_BF.numel())), z_BF).values_n
    return float(_kth(values_n, count, mesh)) if _total(len(values_n), mesh, z_BF) >= count else 0.0


@torch.no_grad()
def calibrate(
    pre_activation: Callable[[Tensor], Tensor],
    batches: Sequence[Float[Tensor, "_ D"]],
    k: int,
    mesh: Mesh = ONE,
) -> Calibration:
    """Compute T, T_k and L0(T) of frozen weights; `pre_activation` maps a batch to z. Two passes over `batches`.

    Over a `mesh` each process has its part of every batch's rows and of the latents, and all find the same.
    Every batch keeps its k * B largest, all at least as large as the smallest value any batch kept. So at least k * N
    values of the set lie at or above that bound, and T_k is exact from those alone.
    """
    kept = [_smallest_kept(z_BF, k, mesh) for z_BF in map(pre_activation, batches)]
    used = [value for value in kept if value > 0]
    bound, tokens = min(kept, default=0.0), 0
    pool: list[Tensor] = []
    for z_BF in map(pre_activation, batches):
        tokens += z_BF.shape[0] * mesh.data.size
        # The set is too large to hold all z of it. What lies below every batch's own smallest kept value can be neither
        # T_k nor above T.
        pool.append(z_BF[(z_BF >= bound) & (z_BF > 0)])
    values = torch.cat(pool)
    short = _total(values.numel(), mesh, values) < k * tokens
    threshold_k = 0.0 if short else float(_kth(values, k * tokens, mesh))
    # The paper's estimator: the mean over batches of the smallest activation kept. Batches that could not fill up with
    # positive values have none, and would pull it to zero.
    threshold = sum(used) / len(used) if used else 0.0
    above = _total(int((values > threshold).sum()), mesh, values)  # a threshold is at least the bound
    return Calibration(threshold, threshold_k, above / tokens, len(used), len(kept) - len(used), tokens)


@dataclass(frozen=True)
class L0Calibration:
    """What bringing the mean L0 to its target found, on `tokens` rows.

    before, l0: the mean number of latents active on a token before and after. level: of the margins, for `before` at 0.
    """

    before: float
    l0: float
    level: float
    tokens: int


def in_parts(
    batches: Sequence[Float[Tensor, "_ D"]], width: int, entries: int = _PART_ENTRIES
) -> list[Float[Tensor, "_ D"]]:
    """Cut batches so that a matrix of their rows and `width` latents has at most so many entries, or one row."""
    rows = max(1, entries // width)
    return [part for batch_BD in batches for part in torch.split(batch_BD, rows)]


@torch.no_grad()
def find_level(
    margins: Callable[[Tensor], Float[Tensor, "B F"]],
    batches: Sequence[Float[Tensor, "_ D"]],
    target: int | float,
    at: float,
    mesh: Mesh = ONE,
) -> L0Calibration:
    """Find the level that `target` margins a row exceed on average over the batches; `at` is the level so far.

    `margins` maps a batch of any size to [B, F]; -inf stands for a latent that cannot fire. Two passes: each batch has
    more than target * B margins at or above its own bound, so the least bound leaves more than are needed of all rows.
    Over a `mesh` each process has its part of every batch's rows and of the latents, and all find the same.
    """
    bounds, active, tokens = [], 0, 0
    for margin_BF in map(margins, batches):
        rows = len(margin_BF) * mesh.data.size
        tokens += rows
        active += int((margin_BF > at).sum())
        place = min(math.ceil(target * rows) + 1, _total(margin_BF.numel(), mesh, margin_BF))
        bounds.append(_kth(margin_BF.flatten(), place, mesh))
    bound = torch.stack(bounds).min()
    values = torch.cat([margin_BF[margin_BF >= bound] for margin_BF in map(margins, batches)])
    count = max(1, min(round(target * tokens), _total(len(values), mesh, values) - 1))
    level = float((_kth(values, count, mesh) + _kth(values, count + 1, mesh)) / 2)
    before, after = _total(active, mesh, values), _total(int((values > level).sum()), mesh, values)
    return L0Calibration(before / tokens, after / tokens, level, tokens)
