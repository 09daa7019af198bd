"""Which pre-activations are kept, as plain values that any backend executes. Ties go to the lowest index.

Letters: B tokens in a batch, F latents, c latents of a block, n entries, d chosen latents, R lines of M values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TopPerToken:
    """The k largest z of each token."""

    k: int
    """Entries a token."""
    positive: bool = True
    """Whether only z above zero are kept."""


@dataclass(frozen=True)
class TopOfBatch:
    """The `count` largest z of the batch."""

    count: int
    """Entries of the whole batch."""
    positive: bool = True
    """Whether only z above zero are kept."""
    guess: Tensor | None = field(default=None, compare=False)
    """About the smallest z that will be kept, such as the last batch's. It saves time and never changes the choice."""


@dataclass(frozen=True, eq=False)
class Above:
    """All z > bound."""

    bound: Tensor
    """One bound, or one for each latent [F]."""


@dataclass(frozen=True)
class Everything:
    """All z."""


Rule = TopPerToken | TopOfBatch | Above | Everything


@dataclass(frozen=True, eq=False)
class Selection:
    """A rule, and the latents that it chooses from."""

    rule: Rule
    """What is kept."""
    latents_d: Int[Tensor, " d"] | None = None
    """Latents to choose from, ascending; None for all. Entries then count them from 0 to d - 1."""
    excluded_d: Bool[Tensor, " d"] | None = None
    """Those of them that a choice of the largest takes last."""


class Entries(NamedTuple):
    """Places and values, by row and then latent."""

    rows_n: Tensor
    latents_n: Tensor
    values_n: Tensor

    def where(self, kept_n: Tensor) -> Entries:
        """List the entries of a mask."""
        index_m = kept_n.nonzero().squeeze(1)  # once for all three
        return Entries(*(part.index_select(0, index_m) for part in self))


def mark_largest(values_RM: Float[Tensor, "R M"], count: int) -> Bool[Tensor, "R M"]:
    """Mark the `count` largest of each line, ties to the lowest index; NaN leaves fewer. Asks the device nothing."""
    smallest = values_RM.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    larger, equal = values_RM > smallest, values_RM == smallest
    # int32 halves the traffic of the running count; a line has less than 2^31 entries.
    left = count - larger.sum(1, keepdim=True)
    return larger | (equal & (equal.cumsum(1, dtype=torch.int32) <= left))


def joined(parts: list[Entries]) -> Entries:
    """Join the entries of several blocks, in order."""
    if len(parts) == 1:
        return parts[0]
    rows_n, latents_n, values_n = (torch.cat(column) for column in zip(*parts, strict=True))
    # Each block is in order, and so is each row's part of it: a stable sort by row is enough.
    rows_n, order_n = torch.sort(rows_n, stable=True)
    return Entries(rows_n, latents_n[order_n], values_n[order_n])
