"""The sparse step on a CPU: selections of any size, found block by block, and torch's own sparse products.

Letters: B tokens in a batch, D model width, F latents, c latents of a block, n entries, d chosen latents.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

from train.sae.sparse.groups import Groups
from train.sae.sparse.product import Product
from train.sae.sparse.rules import (
    Above,
    Entries,
    Everything,
    Rule,
    Selection,
    TopOfBatch,
    TopPerToken,
    joined,
    mark_largest,
)

_GROUP = 32  # neighbours of which only the largest is compared with the bound; a fourth of them or fewer pass
_MARGIN = 0.95  # of a guess at the smallest kept: what is looked at reaches down to there
_ROWS = 1024  # rows projected together: gradient and weights stay in the cache

with warnings.catch_warnings():  # torch says once a process that its CSR tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))


@dataclass(frozen=True)
class CPUBackend:
    """Computes with torch's own operations; asks the device for sizes as it goes."""

    block_entries: int = 1 << 24
    """Entries of z in memory at a time: 64 MiB, as large as a product needs to run at full speed."""
    dense_share: float = 0.15
    """Share of entries above a bound over which all of z is given back: the dense products are then faster."""
    dense_dead: int = 8
    """Multiples of k_aux up to which AuxK takes all of the dead latents' z."""

    @property
    def fixed_sizes(self) -> bool:
        return False

    @property
    def fused(self) -> None:
        return None

    def select(self, product: Product, selections: Sequence[Selection]) -> list[Entries | Tensor]:
        chosen: list[Entries | Tensor] = []
        for selection, kept in zip(selections, self._scanned(product, selections), strict=True):
            if kept is None:  # its guess was too high: z is computed again, and looked at without one
                (kept,) = self._scanned(product, [without_guess(selection)])
                assert kept is not None
            chosen.append(kept)
        return chosen

    def _scanned(self, product: Product, selections: Sequence[Selection]) -> list[Entries | Tensor | None]:
        """Compute z once, and what each selection keeps of it; None where a guess was too high to say."""
        firsts = product.blocks(self.block_entries)
        passes = [_Pass(selection, firsts, product.width, self.dense_share) for selection in selections]
        # One block's memory for all blocks: new memory each time would cost page faults, and z whole hundreds of MB.
        memory = product.xc_BD.new_empty(product.rows * firsts.step)
        whole_BF: Tensor | None = None
        for i, first in enumerate(firsts):
            last = min(first + firsts.step, product.width)
            if whole_BF is None:
                z_Bc = memory[: product.rows * (last - first)].view(product.rows, -1)
            else:
                z_Bc = whole_BF[:, first:last]
            product.block(first, last, z_Bc)
            for each in passes:
                each.feed(z_Bc, first, i)
            if i == 0 and any(each.whole for each in passes):
                # From here on z is written where it stays.
                whole_BF = z_Bc
                if last < product.width:
                    whole_BF = product.xc_BD.new_empty(product.rows, product.width)
                    whole_BF[:, :last] = z_Bc
        return [each.finish(whole_BF) for each in passes]

    def top_of_rows(self, entries: Entries, k: int, rows: int) -> Tensor:
        return top_of_rows(entries, k, rows).nonzero().squeeze(1)

    def mark_largest(self, z_BM: Tensor, k: int) -> Tensor:
        kept = z_BM >= z_BM.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        return kept if int(kept.sum()) == k * len(z_BM) else mark_largest(z_BM, k)  # ties are rare

    def ends(self, index_n: Tensor, groups: int) -> Tensor:
        ends = torch.zeros(groups + 1, dtype=torch.int64, device=index_n.device)
        torch.cumsum(torch.bincount(index_n, minlength=groups), 0, out=ends[1:])
        return ends

    def order(self, index_n: Tensor, groups: int) -> Groups:
        narrow = torch.int16 if groups <= 1 << 15 else torch.int32  # sorts in half the time
        return Groups(index_n, torch.sort(index_n.to(narrow), stable=True).indices, self.ends(index_n, groups))

    def gather_sums(self, weight_n: Tensor, index_n: Tensor, ends: Tensor, table_XD: Tensor) -> Tensor:
        if not len(index_n):
            return table_XD.new_zeros(len(ends) - 1, table_XD.shape[1])
        # torch's own kernel for sums of weighted rows: it reads each row of the table once, and adds in a fixed order.
        return functional.embedding_bag(
            index_n, table_XD, ends, mode="sum", per_sample_weights=weight_n, include_last_offset=True
        )

    def group_sums(self, weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor) -> Tensor:
        weight_n, index_n = weight_n.index_select(0, groups.order_n), index_n.index_select(0, groups.order_n)
        return self.gather_sums(weight_n, index_n, groups.ends, table_XD)

    def group_sums_and_totals(
        self, weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.group_sums(weight_n, index_n, groups, table_XD), self.totals(weight_n, groups)

    def totals(self, values_n: Tensor, groups: Groups) -> Tensor:
        return values_n.new_zeros(len(groups.ends) - 1).index_add_(0, groups.index_n, values_n)

    def dots(self, rows_n: Tensor, latents_n: Tensor, left_XD: Tensor, right_FD: Tensor) -> Tensor:
        if not len(rows_n):
            return left_XD.new_zeros(0)
        # torch computes a product at the places of a CSR matrix, whose entries ascend by row.
        order_n = None
        # Prefixes stack their gradients, so the entries' rows may not ascend: then they are sorted and the results put
        # back.
        if bool((rows_n[1:] < rows_n[:-1]).any()):
            order_n = torch.sort(rows_n, stable=True).indices
            rows_n, latents_n = rows_n[order_n], latents_n[order_n]
        shape = (len(left_XD), len(right_FD))
        places = torch.sparse_csr_tensor(
            self.ends(rows_n, shape[0]), latents_n, left_XD.new_zeros(len(rows_n)), shape, check_invariants=False
        )
        dots_n: Tensor = torch.sparse.sampled_addmm(places, left_XD, right_FD.t(), beta=0.0).values()
        return dots_n if order_n is None else torch.empty_like(dots_n).index_copy_(0, order_n, dots_n)

    def project_rows_(self, grad_FD: Tensor, rows_FD: Tensor) -> None:
        for grad_cD, rows_cD in zip(torch.split(grad_FD, _ROWS), torch.split(rows_FD, _ROWS), strict=True):
            grad_cD.addcmul_((grad_cD * rows_cD).sum(1, keepdim=True), rows_cD, value=-1)

    def fired(self, values_n: Tensor, latents_n: Tensor, width: int) -> Tensor:
        fired_F = torch.zeros(width, dtype=torch.bool, device=values_n.device)
        return fired_F.index_fill_(0, latents_n[values_n > 0], True)


def without_guess(selection: Selection) -> Selection:
    """Give the same selection, to be made without a guess."""
    assert isinstance(selection.rule, TopOfBatch)
    return replace(selection, rule=replace(selection.rule, guess=None))


# Selections while the blocks of z pass by


class _Pass:
    """One selection over the blocks: of all latents, or of some."""

    def __init__(self, selection: Selection, firsts: range, width: int, dense_share: float) -> None:
        self.latents_d, self.excluded_d = selection.latents_d, selection.excluded_d
        self.dense_share = dense_share
        self.scan = scan_of(selection.rule)
        self.whole = self.scan is None and self.latents_d is None
        self.parts: list[Tensor] = []
        if self.latents_d is not None:
            # Ascending latents: those of a block are a slice, and the cuts are found once for all blocks.
            bounds = self.latents_d.new_tensor([*firsts, width])
            self.ends = torch.searchsorted(self.latents_d, bounds).tolist()

    def feed(self, z_Bc: Tensor, first: int, block: int) -> None:
        """Take in a block of z, which begins with the latent `first`."""
        if self.latents_d is not None:
            self._feed_some(z_Bc, self.latents_d, first, block)
            return
        if self.whole or self.scan is None:
            return
        self.scan.feed(z_Bc.contiguous(), first)
        # The first block stands for all: if so many of its entries are kept, sparse products over z would cost more
        # than dense ones.
        if not first and isinstance(self.scan, AboveScan):
            self.whole = self.scan.count > self.dense_share * z_Bc.numel()

    def _feed_some(self, z_Bc: Tensor, latents_d: Tensor, first: int, block: int) -> None:
        start, end = self.ends[block], self.ends[block + 1]
        z_Bd = z_Bc.index_select(1, latents_d[start:end] - first)
        if self.scan is None:
            self.parts.append(z_Bd)
        elif end > start:
            if self.excluded_d is not None:
                z_Bd = z_Bd.masked_fill(self.excluded_d[start:end], -torch.inf)
            self.scan.feed(z_Bd, start)

    def finish(self, whole_BF: Tensor | None) -> Entries | Tensor | None:
        """Give what is kept, None where a guess was too high; `whole_BF` is z where it was kept whole."""
        if self.whole:
            assert whole_BF is not None
            return whole_BF
        if self.scan is not None:
            return self.scan.finish()
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, 1)


class Scan(ABC):
    """Takes in blocks of z, then names the entries it keeps."""

    @abstractmethod
    def feed(self, z_Bc: Float[Tensor, "B c"], first: int) -> None:
        """Take in the next block, contiguous; `first` is the place of its first latent."""

    @abstractmethod
    def finish(self) -> Entries | None:
        """Give what is kept of all that was fed; None where a guess was too high to say."""


def scan_of(rule: Rule) -> Scan | None:
    """Choose what executes a rule block by block; None for everything."""
    match rule:
        case TopPerToken(k, positive):
            return TopPerTokenScan(k, positive=positive)
        case TopOfBatch(count, positive, guess):
            return TopOfBatchScan(count, positive=positive, guess=guess)
        case Above(bound):
            return AboveScan(bound)
        case Everything():
            return None


def _largest(values: Tensor, count: int) -> Tensor:
    """Find the `count`-th largest of a vector."""
    # kthvalue counts from the smallest.
    return values.kthvalue(values.numel() - count + 1).values


class AboveScan(Scan):
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


class _LargestScan(Scan):
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
        """Find a lower bound, scalar or [B, 1], of what is kept,
        from a block's largest of each group and what is held."""

    def feed(self, z_Bc: Float[Tensor, "B c"], first: int) -> None:
        rows, width = z_Bc.shape
        # width & -width is the largest power of two that divides it: groups must not reach over the end of a row.
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


class TopOfBatchScan(_LargestScan):
    """The `count` largest entries of the batch; with `positive` those above zero.

    With a `guess` above zero only what reaches `_MARGIN` of it is looked at. Where so many entries do, all that is to
    be kept is among them, and the choice is the same to the bit; where fewer do, `finish` gives None.
    """

    def __init__(self, count: int, *, positive: bool = True, guess: Tensor | None = None) -> None:
        super().__init__(positive=positive)
        self.count = count
        self.guessed = guess is not None and bool(guess > 0)
        if guess is not None and self.guessed:
            self.bound = guess * _MARGIN
        self.has_nan = False

    def raise_bound(self, most_BG: Tensor) -> Tensor:
        if self.guessed and bool(most_BG.amax().isnan()):
            self.has_nan = True  # a choice without a guess counts NaN among the largest
        if self.parts:
            return self._bound_of_parts()
        if most_BG.numel() < self.count:
            lowest = most_BG.new_full((), 0 if self.positive else -torch.inf)
            return lowest if self.bound is None else self.bound
        if self.bound is not None and int((most_BG >= self.bound).sum()) <= self.count:
            return self.bound
        # `count` groups with a largest of at least this value hold `count` entries of at least it: it bounds the
        # answer from below.
        found = _largest(most_BG.reshape(-1), self.count)
        return found.clamp_min(0) if self.positive else found

    def _bound_of_parts(self) -> Tensor:
        assert self.bound is not None
        values_n = torch.cat([part.values_n for part in self.parts])
        if values_n.numel() < self.count:
            return self.bound
        bound = _largest(values_n, self.count)
        # What the risen bound excludes is dropped at once, so that no more than about `count` entries are held.
        self.parts = [part.where(part.values_n >= bound) for part in self.parts]
        return bound

    def finish(self) -> Entries | None:
        entries = joined(self.parts)
        if self.guessed and (self.has_nan or len(entries.values_n) < self.count):
            return None
        if len(entries.values_n) <= self.count:
            return entries
        smallest = _largest(entries.values_n, self.count)
        entries = entries.where(entries.values_n >= smallest)
        # Only ties at the smallest can be too many; the last ones go, as the rule is "ties to the lowest index".
        if excess := len(entries.values_n) - self.count:
            kept_n = torch.ones_like(entries.rows_n, dtype=torch.bool)
            kept_n[(entries.values_n == smallest).nonzero().squeeze(1)[-excess:]] = False
            entries = entries.where(kept_n)
        return entries


class TopPerTokenScan(_LargestScan):
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
        # k groups whose largest is at least this value hold k entries of the token of at least it.
        self.most = most.topk(self.k, dim=1, sorted=False).values
        return self.most.amin(1, keepdim=True)

    def finish(self) -> Entries:
        assert self.bound is not None
        entries = joined(self.parts)
        entries = entries.where(entries.values_n >= self.bound.squeeze(1)[entries.rows_n])
        return entries.where(top_of_rows(entries, self.k, len(self.bound)))


def top_of_rows(entries: Entries, k: int, rows: int) -> Tensor:
    """Mark which entries are among the k largest of their row, of `rows` rows: [n] bool."""
    counts_B = torch.bincount(entries.rows_n, minlength=rows)
    if not len(entries.rows_n) or (most := int(counts_B.max())) <= k:
        return torch.ones_like(entries.rows_n, dtype=torch.bool)
    starts_B = counts_B.cumsum(0) - counts_B
    # Entries a token differ in number: padded with -inf they make a matrix, on which one topk serves all tokens.
    padded = entries.values_n.new_full((rows, most), -torch.inf)
    place_n = torch.arange(len(entries.rows_n), device=entries.rows_n.device) - starts_B[entries.rows_n]
    padded[entries.rows_n, place_n] = entries.values_n
    smallest_n = padded.topk(k, dim=1).values[:, -1][entries.rows_n]
    # All that are larger are in; of those equal to the smallest as many as there is room for, from the lowest latent
    # on.
    larger_n, equal_n = entries.values_n > smallest_n, entries.values_n == smallest_n
    larger_B = torch.zeros_like(counts_B).index_add_(0, entries.rows_n, larger_n.to(counts_B.dtype))
    before_n = equal_n.cumsum(0) - equal_n.to(counts_B.dtype)  # equals before this one, of all rows
    of_row_n = before_n - before_n[starts_B.clamp_max(len(before_n) - 1)][entries.rows_n]
    return larger_n | (equal_n & (of_row_n < k - larger_B[entries.rows_n]))


def select(rule: Rule, z_BF: Float[Tensor, "B F"]) -> Entries:
    """Execute a rule on a whole z."""
    scan = scan_of(rule)
    assert scan is not None, "everything is z itself"
    scan.feed(z_BF.contiguous(), 0)
    entries = scan.finish()
    assert entries is not None, "a guess needs a backend, which can look again"
    return entries
