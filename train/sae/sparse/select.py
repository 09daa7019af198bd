"""Which pre-activations are kept, found block by block of latents: exact, and never all of z at once.

A selector is fed z [B, c] of consecutive latents and gives the kept entries in the end. Ties go to the lowest index.
Letters: B tokens in a batch, F latents, c latents of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_GROUP = 32  # neighbours of which only the largest is compared with the bound; a fourth of them or fewer pass


class Entries(NamedTuple):
    """Places and values, by row and then latent."""

    rows_n: Tensor
    latents_n: Tensor
    values_n: Tensor

    def where(self, kept_n: Tensor) -> Entries:
        return Entries(*(part[kept_n] for part in self))


def joined(parts: list[Entries]) -> Entries:
    """Entries of several blocks as one, in order."""
    if len(parts) == 1:
        return parts[0]
    rows_n, latents_n, values_n = (torch.cat(column) for column in zip(*parts, strict=True))
    # Each block is in order, and so is each row's part of it: a stable sort by row is enough.
    rows_n, order_n = torch.sort(rows_n, stable=True)
    return Entries(rows_n, latents_n[order_n], values_n[order_n])


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count`-th largest of a vector."""
    return values.kthvalue(values.numel() - count + 1).values


class Selector(ABC):
    """Takes in blocks of z, then names the entries it keeps."""

    @abstractmethod
    def feed(self, z_Bc: Float[Tensor, "B c"], first: int) -> None:
        """The next block, contiguous; `first` is the place of its first latent."""

    @abstractmethod
    def finish(self) -> Entries:
        """What is kept of all that was fed."""


class Above(Selector):
    """z > bound, one bound or one for each latent."""

    def __init__(self, bound: Tensor) -> None:
        self.bound = bound
        self.parts: list[Entries] = []
        self.count = 0  # kept so far

    def feed(self, z_Bc: Float[Tensor, "B c"], first: int) -> None:
        bound = self.bound if not self.bound.dim() else self.bound[first : first + z_Bc.shape[1]]
        flat = (z_Bc > bound).view(-1).nonzero().squeeze(1)
        self.count += len(flat)
        rows_n = flat.div(z_Bc.shape[1], rounding_mode="floor")
        self.parts.append(Entries(rows_n, flat - rows_n * z_Bc.shape[1] + first, z_Bc.view(-1)[flat]))

    def finish(self) -> Entries:
        return joined(self.parts)


class _Largest(Selector):
    """Keeps what lies at or above a lower bound of the answer; the bound rises with what is seen.

    A block is looked at in groups: the largest of each bounds the answer from below, and says which groups are worth
    reading. So about one pass over z is made, and nothing of its size is sorted.
    """

    def __init__(self, *, positive: bool) -> None:
        self.positive = positive  # only values above zero are kept
        self.bound: Tensor | None = None
        self.parts: list[Entries] = []

    @abstractmethod
    def raise_bound(self, most_BG: Tensor) -> Tensor:
        """A lower bound, scalar or [B, 1], of what is kept, from a block's largest of each group and what is held."""

    def feed(self, z_Bc: Float[Tensor, "B c"], first: int) -> None:
        rows, width = z_Bc.shape
        group = min(_GROUP, width & -width)
        grouped = z_Bc.view(-1, group)
        most_BG = grouped.amax(1).view(rows, -1)
        bound = self.raise_bound(most_BG)
        reach_BG = most_BG >= bound
        if self.positive:
            reach_BG &= most_BG > 0
        hit = reach_BG.view(-1).nonzero().squeeze(1)
        near = grouped.index_select(0, hit)
        of_row = hit.div(most_BG.shape[1], rounding_mode="floor")
        kept = near >= (bound if not bound.dim() else bound[of_row])
        if self.positive:
            kept &= near > 0
        flat = kept.view(-1).nonzero().squeeze(1)
        which = flat.div(group, rounding_mode="floor")
        rows_n = of_row[which]
        latents_n = hit[which] * group + (flat - which * group) - rows_n * width + first
        self.parts.append(Entries(rows_n, latents_n, near.view(-1)[flat]))
        self.bound = bound


class TopOfBatch(_Largest):
    """The `count` largest entries of the batch; with `positive` those above zero."""

    def __init__(self, count: int, *, positive: bool = True) -> None:
        super().__init__(positive=positive)
        self.count = count

    def raise_bound(self, most_BG: Tensor) -> Tensor:
        if self.bound is None:
            if most_BG.numel() >= self.count:
                found = _largest(most_BG.reshape(-1), self.count)
                return found.clamp_min(0) if self.positive else found
            return most_BG.new_full((), 0 if self.positive else -torch.inf)
        values_n = torch.cat([part.values_n for part in self.parts])
        if values_n.numel() < self.count:
            return self.bound
        bound = _largest(values_n, self.count)
        self.parts = [part.where(part.values_n >= bound) for part in self.parts]
        return bound

    def finish(self) -> Entries:
        entries = joined(self.parts)
        if len(entries.values_n) <= self.count:
            return entries
        smallest = _largest(entries.values_n, self.count)
        entries = entries.where(entries.values_n >= smallest)
        if excess := len(entries.values_n) - self.count:
            kept_n = torch.ones_like(entries.rows_n, dtype=torch.bool)
            kept_n[(entries.values_n == smallest).nonzero().squeeze(1)[-excess:]] = False
            entries = entries.where(kept_n)
        return entries


class TopPerToken(_Largest):
    """The k largest entries of each token; with `positive` those above zero."""

    def __init__(self, k: int, *, positive: bool = True) -> None:
        super().__init__(positive=positive)
        self.k = k
        self.most: Tensor | None = None  # [B, up to k]: the largest of the groups' largest

    def raise_bound(self, most_BG: Tensor) -> Tensor:
        most = most_BG if self.most is None else torch.cat([self.most, most_BG], 1)
        if most.shape[1] < self.k:
            self.most = most
            return most.new_full((len(most), 1), -torch.inf)
        self.most = most.topk(self.k, dim=1, sorted=False).values
        return self.most.amin(1, keepdim=True)

    def finish(self) -> Entries:
        assert self.bound is not None
        entries = joined(self.parts)
        entries = entries.where(entries.values_n >= self.bound.squeeze(1)[entries.rows_n])
        return entries.where(top_of_rows(entries, self.k, len(self.bound)))


def top_of_rows(entries: Entries, k: int, rows: int) -> Tensor:
    """Which entries are among the k largest of their row, of `rows` rows: [n] bool."""
    counts_B = torch.bincount(entries.rows_n, minlength=rows)
    if not len(entries.rows_n) or (most := int(counts_B.max())) <= k:
        return torch.ones_like(entries.rows_n, dtype=torch.bool)
    starts_B = counts_B.cumsum(0) - counts_B
    padded = entries.values_n.new_full((rows, most), -torch.inf)
    place_n = torch.arange(len(entries.rows_n), device=entries.rows_n.device) - starts_B[entries.rows_n]
    padded[entries.rows_n, place_n] = entries.values_n
    smallest_n = padded.topk(k, dim=1).values[:, -1][entries.rows_n]
    larger_n, equal_n = entries.values_n > smallest_n, entries.values_n == smallest_n
    larger_B = torch.zeros_like(counts_B).index_add_(0, entries.rows_n, larger_n.to(counts_B.dtype))
    before_n = equal_n.cumsum(0) - equal_n.to(counts_B.dtype)  # equals before this one, of all rows
    of_row_n = before_n - before_n[starts_B.clamp_max(len(before_n) - 1)][entries.rows_n]
    return larger_n | (equal_n & (of_row_n < k - larger_B[entries.rows_n]))


def select(selector: Selector, z_BF: Float[Tensor, "B F"]) -> Entries:
    """What a selector keeps of a whole z."""
    selector.feed(z_BF.contiguous(), 0)
    return selector.finish()
