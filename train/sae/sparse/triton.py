"""The sparse step on a GPU: sizes are known beforehand, so that the host need not wait for the device.

What lies above a bound is the exception: its size is waited for, once a step. A choice of the largest holds exactly as
many entries as were asked for; what is not positive among them is given the value 0 by the encoder, takes no gradient
and does not count as fired. Exact, ties to the lowest index. The products are Triton's (kernels/), which is imported
where it is first needed.
Letters: B tokens in a batch, D model width, F latents, n entries, R lines of M values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from train.sae.sparse.above import Block, Packed, select_above
from train.sae.sparse.adam import AdamStep
from train.sae.sparse.candidates import Tiles, can_sample, find_candidates
from train.sae.sparse.groups import Groups, cut_groups
from train.sae.sparse.product import Product
from train.sae.sparse.row_norms import RowNorms
from train.sae.sparse.rules import Above, Entries, Everything, Selection, TopOfBatch, TopPerToken, joined, mark_largest

_GROUP = 32  # neighbours of which only the largest takes part in the first choice


@dataclass(frozen=True)
class TritonBackend:
    """Computes with Triton's kernels, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1 before its import)."""

    block_entries: int = 1 << 28
    """Entries of z in memory at a time."""
    dense_share: float = 1 / 32
    """Share of entries above a bound over which all of z is given back: the dense products should then be faster, by
    estimate. There is room for so many entries while z passes by, 8 bytes each."""
    dense_dead: int = 128
    """Multiples of k_aux up to which AuxK takes all of the dead latents' z; set for memory, not yet measured."""

    candidates_from: int | None = None
    """Entries of z from which on a choice of the largest writes what may be chosen, and never z; None: always z.
    The host then waits once for each choice, so that no CUDA graph can hold the step."""

    @property
    def fixed_sizes(self) -> bool:
        return True

    def select(self, product: Product, selections: Sequence[Selection]) -> list[Entries | Tensor]:
        # A product for each selection: the latents of a second one are few, so their z is computed again rather than
        # cut out of all blocks.
        return [self._selected(product, selection) for selection in selections]

    def _selected(self, product: Product, selection: Selection) -> Entries | Tensor:
        rule, latents_d = selection.rule, selection.latents_d
        if latents_d is not None:
            z_Bd = product.of(latents_d)
            if isinstance(rule, Everything):
                return z_Bd
            assert not isinstance(rule, Above), "what lies above a bound is looked for among all latents"
            if selection.excluded_d is not None:
                z_Bd.masked_fill_(selection.excluded_d, -torch.inf)
            return choose(rule, [0], lambda first, last: z_Bd, len(latents_d))
        if isinstance(rule, Everything):
            return product.block(0, product.width)
        if isinstance(rule, Above):
            return select_above(
                product,
                rule.bound,
                block_entries=self.block_entries,
                dense_share=self.dense_share,
                pack=self.pack_above,
                read=self.read,
            )
        if self.takes_candidates(rule, product.rows, product.width):
            found = find_candidates(product, rule, self)
            place_n = _places(rule, found.values_n, product.rows)
            rows_n, latents_n = found.rows(place_n), found.latents_n.index_select(0, place_n).long()
            # Waited for once all of it is on its way.
            if self.holds(found.certain):
                return Entries(rows_n, latents_n, found.values_n.index_select(0, place_n))
        firsts = product.blocks(self.block_entries)
        memory = product.xc_BD.new_empty(product.rows * firsts.step)

        def z_of(first: int, last: int) -> Tensor:
            return product.block(first, last, memory[: product.rows * (last - first)].view(product.rows, -1))

        return choose(rule, firsts, z_of, product.width)

    def takes_candidates(self, rule: TopOfBatch | TopPerToken, rows: int, width: int) -> bool:
        """Say whether z of this size is not written for a choice, which the host then waits for."""
        if self.candidates_from is None or rows * width < self.candidates_from:
            return False
        return can_sample(rule, rows, width)

    def product_above(self, product: Product, bounds_B: Tensor, slots: int) -> Tiles:
        """Compute z, and keep what is not below the bound of its token, in tiles of so many slots each."""
        from train.sae.sparse.kernels.candidates import product_above

        return product_above(product, bounds_B, slots)

    def order_entries(self, tiles: Tiles, starts_B: Tensor, limits_B: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Bring each token's values and latents to where they begin, up to a limit, of so many places in all."""
        from train.sae.sparse.kernels.candidates import order_entries

        return order_entries(tiles, starts_B, limits_B, room)

    def holds(self, condition: Tensor) -> bool:
        """Wait for what the device says of a condition."""
        return bool(condition)

    def pack_above(self, z_Bc: Tensor, bound: Tensor, block: Block, packed: Packed) -> None:
        """Pack what lies above a bound, of a block of z."""
        from train.sae.sparse.kernels.above import pack_above

        pack_above(z_Bc, bound, block, packed)

    def read(self, number: Tensor) -> int:
        """Wait for a number of the device's."""
        return int(number)

    def top_of_rows(self, entries: Entries, k: int, rows: int) -> Tensor:
        return largest(entries.values_n.view(rows, -1), k)  # equally many of each row

    def mark_largest(self, z_BM: Tensor, k: int) -> Tensor:
        return mark_largest(z_BM, k)

    def ends(self, index_n: Tensor, groups: int) -> Tensor:
        return torch.searchsorted(index_n, torch.arange(groups + 1, dtype=index_n.dtype, device=index_n.device))

    def order(self, index_n: Tensor, groups: int) -> Groups:
        ascending = torch.sort(index_n.to(torch.int32), stable=True)
        ends = self.ends(ascending.values, groups)
        return Groups(index_n, ascending.indices, ends, cut_groups(ends, len(index_n)))

    def gather_sums(self, weight_n: Tensor, index_n: Tensor, ends: Tensor, table_XD: Tensor) -> Tensor:
        from train.sae.sparse.kernels.sums import group_sums

        return group_sums(weight_n, index_n, ends, table_XD)[0]

    def group_sums(self, weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor) -> Tensor:
        return self.group_sums_and_totals(weight_n, index_n, groups, table_XD)[0]

    def group_sums_and_totals(
        self, weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor
    ) -> tuple[Tensor, Tensor]:
        from train.sae.sparse.kernels.sums import group_sums

        return group_sums(weight_n, index_n, groups.ends, table_XD, groups.order_n, groups.pieces)

    def gradient_rows(
        self, weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor, unit_FD: Tensor | None
    ) -> tuple[Tensor, Tensor, RowNorms]:
        from train.sae.sparse.kernels.sums import gradient_rows

        return gradient_rows(weight_n, index_n, groups, table_XD, unit_FD)

    def totals(self, values_n: Tensor, groups: Groups) -> Tensor:
        # The kernel of the sums adds the weights too, in a fixed order; its rows are a single 1 here.
        one_11 = values_n.new_ones(1, 1)
        return self.group_sums_and_totals(values_n, torch.zeros_like(groups.index_n), groups, one_11)[1]

    def dots(self, rows_n: Tensor, latents_n: Tensor, left_XD: Tensor, right_FD: Tensor) -> Tensor:
        from train.sae.sparse.kernels.dots import entry_dots

        return entry_dots(rows_n, latents_n, left_XD, right_FD)

    def project_rows_(self, grad_FD: Tensor, rows_FD: Tensor) -> None:
        from train.sae.sparse.kernels.project import project_rows_

        project_rows_(grad_FD, rows_FD)

    @property
    def fused(self) -> TritonBackend:
        return self

    def decode_error(
        self,
        values_n: Tensor,
        latents_n: Tensor,
        ends: Tensor,
        W_dec_FD: Tensor,
        base: Tensor,
        target_BD: Tensor,
        prefixes: int = 1,
        *,
        through_zeros: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from train.sae.sparse.kernels.error import decode_error

        parts = (values_n, latents_n, ends, W_dec_FD, base, target_BD, prefixes)
        return decode_error(*parts, through_zeros=through_zeros)

    def row_norms(self, grad_FD: Tensor, rows_FD: Tensor | None) -> tuple[Tensor, Tensor]:
        from train.sae.sparse.kernels.norms import row_norms

        return row_norms(grad_FD, rows_FD)

    def adam_rows_(
        self,
        grad_FD: Tensor,
        weight_FD: Tensor,
        mean_FD: Tensor,
        square_FD: Tensor,
        *,
        step: Tensor,
        settings: AdamStep,
        dots_F: Tensor | None,
        total: Tensor | None,
    ) -> None:
        from train.sae.sparse.kernels.adam import adam_rows_

        moments = (mean_FD, square_FD)
        adam_rows_(grad_FD, weight_FD, *moments, step=step, settings=settings, dots_F=dots_F, total=total)

    def fired(self, values_n: Tensor, latents_n: Tensor, width: int) -> Tensor:
        # Counted rather than indexed by a mask, whose size the host would have to wait for.
        counts_F = torch.zeros(width, dtype=torch.int32, device=values_n.device)
        return counts_F.index_add_(0, latents_n, (values_n > 0).int()) > 0


def largest(values_RM: Float[Tensor, "R M"], count: int) -> Int[Tensor, " n"]:
    """Find the places, in the flattened values and ascending, of the `count` largest of each line; ties to the lowest.

    No more than `count` groups can hold them: those of the largest maxima, ties to the lowest. So two small choices
    are made, the first among the groups' maxima, and the values are read once.
    """
    lines, width = values_RM.shape
    group = min(_GROUP, width & -width)
    # So many are asked for that every group may hold one: the first choice would exclude nothing.
    if count >= width // group:
        return _largest(values_RM, count)
    near = _largest(values_RM.view(lines, -1, group).amax(2), count)
    place = (near[:, None] * group + torch.arange(group, device=near.device)).view(-1)
    values = values_RM.reshape(-1).index_select(0, place).view(lines, -1)
    return place.index_select(0, _largest(values, count))


def _largest(values_RM: Tensor, count: int) -> Tensor:
    kept = mark_largest(values_RM, count)
    # Where NaN leaves fewer, the rest is place 0: the loss tells of the NaN.
    return torch.nonzero_static(kept.view(-1), size=len(values_RM) * count, fill_value=0).squeeze(1)


def _places(rule: TopOfBatch | TopPerToken, values: Tensor, rows: int) -> Tensor:
    """Find where the rule's entries stand among values, of so many rows, in order."""
    if isinstance(rule, TopOfBatch):
        return largest(values.view(1, -1), min(rule.count, values.numel()))
    lines_RM = values.view(rows, -1)
    return largest(lines_RM, min(rule.k, lines_RM.shape[1]))


def choose(
    rule: TopOfBatch | TopPerToken,
    blocks: Sequence[int],
    z_of: Callable[[int, int], Float[Tensor, "B c"]],
    width: int,
) -> Entries:
    """Execute a rule on z, of which `z_of` gives the latents from one of `blocks` to the next."""
    best: Entries | None = None
    rows = 0
    for first, last in zip(blocks, [*blocks[1:], width], strict=True):
        z_Bc = z_of(first, last)
        rows = len(z_Bc)
        place_n = _places(rule, z_Bc, rows)
        rows_n = place_n.div(last - first, rounding_mode="floor")
        new = Entries(rows_n, place_n - rows_n * (last - first) + first, z_Bc.reshape(-1).index_select(0, place_n))
        if best is None:
            best = new
        else:
            # A running choice: what is not among the largest of the blocks so far cannot be among those of all. It
            # keeps sizes fixed whatever the values are.
            both = joined([best, new])
            place_n = _places(rule, both.values_n, rows)
            best = Entries(*(part.index_select(0, place_n) for part in both))
    assert best is not None
    return best
