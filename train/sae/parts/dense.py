"""The plain choices that dense forms are written with: a mask of the largest, ties to the lowest index."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def largest_of_each_token(z_BF: Float[Tensor, "B F"], k: int) -> Bool[Tensor, "B F"]:
    """Mark the k largest entries of each row."""
    # topk says nothing of ties; a stable sort keeps equal values in the order of their indices, so the lowest comes
    # first.
    order_BF = z_BF.detach().argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(z_BF, dtype=torch.bool).scatter_(1, order_BF[:, :k], True)


def largest_of_the_batch(z_BF: Float[Tensor, "B F"], count: int) -> Bool[Tensor, "B F"]:
    """Mark the `count` largest entries of all."""
    return largest_of_each_token(z_BF.reshape(1, -1), count).view_as(z_BF)
