"""Thresholds: that of BatchTopK's inference form, and the level at which a wanted L0 is met after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from train.sae.sparse.cpu import select
from train.sae.sparse.rules import TopOfBatch


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


def _smallest_kept(z_BF: Tensor, count: int) -> float:
    """Find the `count`-th largest of z, 0 where fewer are positive."""
    values_n = select(TopOfBatch(count), z_BF).values_n
    return float(values_n.min()) if len(values_n) == count else 0.0


@torch.no_grad()
def calibrate(
    pre_activation: Callable[[Tensor], Tensor],
    batches: Sequence[Float[Tensor, "_ D"]],
    k: int,
) -> Calibration:
    """Compute T, T_k and L0(T) of frozen weights; `pre_activation` maps a batch to z. Two passes over `batches`.

    Every batch keeps its k * B largest, all at least as large as the smallest value any batch kept. So at least k * N
    values of the set lie at or above that bound, and T_k is exact from those alone.
    """
    kept = [_smallest_kept(z_BF, k * z_BF.shape[0]) for z_BF in map(pre_activation, batches)]
    used = [value for value in kept if value > 0]
    bound, tokens = min(kept, default=0.0), 0
    pool: list[Tensor] = []
    for z_BF in map(pre_activation, batches):
        tokens += z_BF.shape[0]
        # The set is too large to hold all z of it. What lies below every batch's own smallest kept value can be neither
        # T_k nor above T.
        pool.append(z_BF[(z_BF >= bound) & (z_BF > 0)])
    values = torch.cat(pool)
    short = values.numel() < k * tokens
    threshold_k = 0.0 if short else float(values.kthvalue(values.numel() - k * tokens + 1).values)
    # The paper's estimator: the mean over batches of the smallest activation kept. Batches that could not fill up with
    # positive values have none, and would pull it to zero.
    threshold = sum(used) / len(used) if used else 0.0
    above = int((values > threshold).sum())  # a threshold is at least the bound
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


@torch.no_grad()
def find_level(
    margins: Callable[[Tensor], Float[Tensor, "B F"]],
    batches: Sequence[Float[Tensor, "_ D"]],
    target: int | float,
    at: float,
) -> L0Calibration:
    """Find the level that `target` margins a row exceed on average over the batches; `at` is the level so far.

    `margins` maps a batch to [B, F]; -inf stands for a latent that cannot fire. Two passes: each batch has more than
    target * B margins at or above its own bound, so the least bound leaves more than are needed of all rows.
    """
    bounds, active, tokens = [], 0, 0
    for margin_BF in map(margins, batches):
        tokens += len(margin_BF)
        active += int((margin_BF > at).sum())
        rank = min(math.ceil(target * len(margin_BF)) + 1, margin_BF.numel())
        bounds.append(margin_BF.flatten().kthvalue(margin_BF.numel() - rank + 1).values)
    bound = torch.stack(bounds).min()
    values = torch.cat([margin_BF[margin_BF >= bound] for margin_BF in map(margins, batches)]).sort(descending=True)[0]
    count = min(round(target * tokens), len(values) - 1)
    level = float((values[count - 1] + values[count]) / 2)
    return L0Calibration(active / tokens, int((values > level).sum()) / tokens, level, tokens)
