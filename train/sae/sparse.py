"""Which pre-activations are kept: exact selection per token and over the batch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SAMPLE = 1 << 16  # entries looked at for a first guess of the threshold
_WORTH = 1 << 18  # below so many entries the guess costs more than it saves


def top_per_token(z_BF: Float[Tensor, "B F"], k: int) -> Bool[Tensor, "B F"]:
    """The k largest entries of each row, those above zero."""
    index_Bk = z_BF.detach().topk(k, dim=1, sorted=False).indices
    kept_BF = torch.zeros_like(z_BF, dtype=torch.bool).scatter_(1, index_Bk, True)
    return kept_BF.logical_and_(z_BF > 0)


def top_of_batch(z_BF: Float[Tensor, "B F"], count: int) -> tuple[Bool[Tensor, "B F"], Float[Tensor, ""]]:
    """The `count` largest entries of the whole batch, those above zero; equal ones by lowest index.

    Returns the mask and the smallest value kept, which is 0 where fewer than `count` entries are positive. Nothing of
    size B * F is sorted: a guess from a sample bounds the threshold from below, and the exact one is found among the
    few entries above the guess.
    """
    flat = z_BF.detach().reshape(-1)
    candidates = flat[flat > _guess(flat, count, z_BF.shape[1])]
    if candidates.numel() < count:
        candidates = flat[flat > 0]
    if candidates.numel() < count:
        return z_BF.detach() > 0, flat.new_zeros(())
    smallest = candidates.kthvalue(candidates.numel() - count + 1).values
    kept = flat >= smallest
    excess = int((candidates >= smallest).sum()) - count
    if excess:
        kept[(flat == smallest).nonzero().squeeze(1)[-excess:]] = False
    return kept.view_as(z_BF), smallest


def _guess(flat: Tensor, count: int, width: int) -> float:
    """A value (at least 0) that about 1.5 * count entries exceed, from an evenly spaced sample; 0 for a small batch."""
    if flat.numel() < _WORTH:
        return 0.0
    stride = flat.numel() // _SAMPLE
    while math.gcd(stride, width) != 1:  # else the sample would see only some of the latents
        stride += 1
    sample = flat[::stride]
    rank = math.ceil(1.5 * count / stride) + 1
    if rank >= sample.numel():
        return 0.0
    return max(0.0, float(sample.kthvalue(sample.numel() - rank + 1).values))
