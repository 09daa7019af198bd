"""Triton's backend without Triton: what counts a step of the GPU's path where there is no GPU.

Letters: B tokens in a batch, D model width, F latents, n entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.counter import Counter, Operation, extent
from train.sae.sparse.above import PIECE_LATENTS, Block, Packed
from train.sae.sparse.adam import WHOLE_ROW, AdamStep
from train.sae.sparse.candidates import TOKENS, Tiles, tiles_of
from train.sae.sparse.cpu import CPUBackend
from train.sae.sparse.groups import Groups
from train.sae.sparse.product import Product
from train.sae.sparse.row_norms import RowNorms
from train.sae.sparse.rules import Entries, Selection
from train.sae.sparse.triton import TritonBackend

PACKED_BYTES = 8  # of an entry above a bound, before it is in order: its latent in 32 bits and its value


@dataclass(frozen=True)
class StandIn(TritonBackend):
    """Triton's backend without Triton: the kernels' results come from torch, or are shapes alone of fake tensors.

    Their traffic: each entry reads the rows it names and its own numbers; each row of a result is written once.
    """

    counter: Counter = field(default_factory=Counter)
    """What counts."""
    above: int = 0
    """Entries above a bound, of fake tensors, of which nothing else tells how many there are."""

    def select(self, product: Product, selections: Sequence[Selection]) -> list[Entries | Tensor]:
        with self.counter.within("selection"):
            return super().select(product, selections)

    def pack_above(self, z_Bc: Tensor, bound: Tensor, block: Block, packed: Packed) -> None:
        with self.counter.kernel("selection", extent(z_Bc) + extent(bound), 16 * len(z_Bc) * block.pieces):
            if not isinstance(z_Bc, FakeTensor):
                _pack(z_Bc, bound, block, packed)

    def product_above(self, product: Product, bounds_B: Tensor, slots: int) -> Tiles:
        # Its factors once each, as any product is counted: tiles read them more often, from the cache. A fourth of the
        # slots are filled, which are four times as many as are expected.
        shape = tiles_of(product.rows, product.width)
        tiles = math.prod(shape)
        bias = 0 if product.bias_F is None else extent(product.bias_F)
        read = extent(product.xc_BD) + extent(product.W_enc_FD) + bias + extent(bounds_B)
        with self.counter.kernel("products", read, tiles * (4 * TOKENS + PACKED_BYTES * (slots // 4))):
            values_S, ends_RTB = bounds_B.new_empty(*shape, slots), bounds_B.new_empty(*shape, TOKENS).int()
            found = Tiles(values_S, values_S.int(), ends_RTB)
        for tensor in found:
            self.counter.watch(tensor)
        return found

    def order_entries(self, tiles: Tiles, starts_B: Tensor, limits_B: Tensor, room: int) -> tuple[Tensor, Tensor]:
        # All places are filled with nothing first, and most of them are needed.
        moved = PACKED_BYTES * room
        read = extent(tiles.ends_RTB) + extent(starts_B) + extent(limits_B) + moved
        with self.counter.kernel("selection", read, PACKED_BYTES * room + moved):
            values_n, latents_n = tiles.values_S.new_empty(room), tiles.latents_S.new_empty(room)
        self.counter.watch(values_n)
        self.counter.watch(latents_n)
        return values_n, latents_n

    def holds(self, condition: Tensor) -> bool:
        assert isinstance(condition, FakeTensor), "of a choice among candidates only shapes are counted"
        self.counter.operations.append(Operation("_local_scalar_dense", "selection", 1, 0, waits=True))
        return True

    def read(self, number: Tensor) -> int:
        if isinstance(number, FakeTensor):
            self.counter.operations.append(Operation("_local_scalar_dense", "selection", 8, 0, waits=True))
            entries = self.above
        else:
            entries = super().read(number)
        packed = min(entries, int(self.dense_share * self.counter.z_entries))  # those that found room
        with self.counter.kernel("selection", 0, PACKED_BYTES * packed):  # what the packing has written
            pass
        return entries

    def order(self, index_n: Tensor, groups: int) -> Groups:
        with self.counter.within("sparse products"):
            return super().order(index_n, groups)

    def ends(self, index_n: Tensor, groups: int) -> Tensor:
        with self.counter.within("sparse products"):
            return super().ends(index_n, groups)

    def gather_sums(self, weight_n: Tensor, index_n: Tensor, ends: Tensor, table_XD: Tensor) -> Tensor:
        groups = Groups(index_n, torch.empty(0, dtype=torch.int64), ends)
        with self.counter.kernel("sparse products", *_sums_traffic(weight_n, index_n, groups, table_XD)):
            if isinstance(table_XD, FakeTensor):
                sums = table_XD.new_empty(len(ends) - 1, table_XD.shape[1])
            else:
                sums = _sums(weight_n, index_n, ends, table_XD)[0]
        self.counter.watch(sums)
        return sums

    def group_sums_and_totals(
        self, weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._sums_and_totals(weight_n, index_n, groups, table_XD, (0, 0))

    def _sums_and_totals(
        self, weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor, beside: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Count the sums, and what the same kernel reads and writes `beside` them."""
        if groups.pieces is not None:  # at most; a piece of a long group is written and read
            parts = 2 * len(groups.pieces.groups_P) * table_XD.shape[1] * table_XD.element_size()
            with self.counter.kernel("sparse products", parts // 2, parts // 2):
                pass
        read, written = _sums_traffic(weight_n, index_n, groups, table_XD)
        with self.counter.kernel("sparse products", read + beside[0], written + beside[1]):
            if isinstance(table_XD, FakeTensor):
                count = len(groups.ends) - 1
                sums, totals = table_XD.new_empty(count, table_XD.shape[1]), table_XD.new_empty(count)
            else:
                sorted_n, order_n = weight_n[groups.order_n], index_n[groups.order_n]
                sums, totals = _sums(sorted_n, order_n, groups.ends, table_XD)
        self.counter.watch(sums)
        self.counter.watch(totals)
        return sums, totals

    def gradient_rows(
        self, weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor, unit_FD: Tensor | None
    ) -> tuple[Tensor, Tensor, RowNorms]:
        norms = 2 * (len(groups.ends) - 1) * table_XD.element_size()
        beside = (0 if unit_FD is None else extent(unit_FD), norms)
        sums, totals = self._sums_and_totals(weight_n, index_n, groups, table_XD, beside)
        self.counter.paused = True
        dots_F, squares_F = _row_norms(sums, unit_FD)
        self.counter.paused = False
        self.counter.watch(dots_F)
        self.counter.watch(squares_F)
        return sums, totals, RowNorms(squares_F, None if unit_FD is None else dots_F)

    def dots(self, rows_n: Tensor, latents_n: Tensor, left_XD: Tensor, right_FD: Tensor) -> Tensor:
        rows = 2 * len(rows_n) * left_XD.shape[1] * left_XD.element_size()
        written = len(rows_n) * left_XD.element_size()
        with self.counter.kernel("sparse products", rows + extent(rows_n) + extent(latents_n), written):
            if isinstance(left_XD, FakeTensor):
                dots = left_XD.new_empty(len(rows_n))
            else:
                dots = (left_XD[rows_n] * right_FD[latents_n]).sum(1)
        self.counter.watch(dots)
        return dots

    def project_rows_(self, grad_FD: Tensor, rows_FD: Tensor) -> None:
        with self.counter.kernel("parameters", extent(grad_FD) + extent(rows_FD), extent(grad_FD)):
            if not isinstance(grad_FD, FakeTensor):
                CPUBackend().project_rows_(grad_FD, rows_FD)

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
        # Of a token with more entries than a tile some rows are read again, which is not counted; nor is what a program
        # reads of the errors that it has just written.
        rows, tokens = len(values_n) * W_dec_FD.shape[1] * W_dec_FD.element_size(), len(target_BD)
        read = rows + sum(map(extent, (values_n, latents_n, ends, base, target_BD)))
        with self.counter.kernel("sparse products", read, prefixes * extent(target_BD) + extent(values_n)):
            errors_XD = target_BD.new_empty(tokens * prefixes, target_BD.shape[1])
            squares_B, last_B = target_BD.new_empty(tokens), target_BD.new_empty(tokens)
            dots_n = torch.empty_like(values_n)
            if not isinstance(W_dec_FD, FakeTensor):
                bands_BPD = _sums(values_n, latents_n, ends, W_dec_FD)[0].view(tokens, prefixes, -1)
                errors_BPD = bands_BPD.cumsum(1) + (base - target_BD)[:, None]
                squares_B, last_B = errors_BPD.square().sum((1, 2)), errors_BPD[:, -1].square().sum(1)
                errors_XD = errors_BPD.flip(1).cumsum(1).flip(1).reshape(errors_XD.shape)
                dots_n = (errors_XD[_groups_of(ends, len(values_n))] * W_dec_FD[latents_n]).sum(1)
                dots_n = dots_n if through_zeros else torch.where(values_n == 0, 0.0, dots_n)
        for tensor in (errors_XD, squares_B, last_B, dots_n):
            self.counter.watch(tensor)
        return errors_XD, squares_B, last_B, dots_n

    def row_norms(self, grad_FD: Tensor, rows_FD: Tensor | None) -> tuple[Tensor, Tensor]:
        read = extent(grad_FD) + (0 if rows_FD is None else extent(rows_FD))
        with self.counter.kernel("parameters", read, 2 * len(grad_FD) * grad_FD.element_size()):
            dots_F, squares_F = _row_norms(grad_FD, rows_FD)
        self.counter.watch(dots_F)
        self.counter.watch(squares_F)
        return dots_F, squares_F

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
        again = 0  # a row that a program takes in pieces is read and written once more to be brought to unit length
        if dots_F is not None and weight_FD.shape[1] > WHOLE_ROW:
            again = extent(weight_FD)
        with self.counter.kernel("parameters", 4 * extent(weight_FD) + again, 3 * extent(weight_FD) + again):
            if not isinstance(weight_FD, FakeTensor):
                _adam(grad_FD, weight_FD, mean_FD, square_FD, step, settings, dots_F, total)


def _adam(
    grad_FD: Tensor,
    weight_FD: Tensor,
    mean_FD: Tensor,
    square_FD: Tensor,
    step: Tensor,
    settings: AdamStep,
    dots_F: Tensor | None,
    total: Tensor | None,
) -> None:
    """Take the kernel's step by torch's own operations."""
    if dots_F is not None:
        grad_FD = grad_FD - dots_F[:, None] * weight_FD
    if total is not None:
        assert settings.clip is not None
        grad_FD = grad_FD * (settings.clip / (total.sqrt() + 1e-6)).clamp(max=1)
    fused = torch._fused_adamw_ if settings.decoupled else torch._fused_adam_
    fused(
        [weight_FD],
        [grad_FD],
        [mean_FD],
        [square_FD],
        [],
        [step],
        lr=settings.rate,
        beta1=settings.decay_1,
        beta2=settings.decay_2,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
    )
    if dots_F is not None:
        weight_FD.div_(torch.linalg.vector_norm(weight_FD, dim=1, keepdim=True).clamp_min_(1e-12))


def _groups_of(ends: Tensor, entries: int) -> Tensor:
    """Give the group of each entry, of those that `ends` bounds."""
    return torch.searchsorted(ends[1:], torch.arange(entries, dtype=ends.dtype), right=True)


def _sums(weight_n: Tensor, index_n: Tensor, ends: Tensor, table_XD: Tensor) -> tuple[Tensor, Tensor]:
    """Sum weight * table[index], and weight, over groups of entries in order; asks for no value, as the kernel does."""
    group_n = _groups_of(ends, len(weight_n))
    rows_nD = torch.where(weight_n[:, None] != 0, weight_n[:, None] * table_XD[index_n], 0.0)
    sums_GD = table_XD.new_zeros(len(ends) - 1, table_XD.shape[1]).index_add_(0, group_n, rows_nD)
    return sums_GD, table_XD.new_zeros(len(ends) - 1).index_add_(0, group_n, weight_n)


def _row_norms(grad_FD: Tensor, rows_FD: Tensor | None) -> tuple[Tensor, Tensor]:
    rest_FD, dots_F = grad_FD, grad_FD.new_empty(len(grad_FD))
    if rows_FD is not None:
        dots_F = (grad_FD * rows_FD).sum(1)
        rest_FD = grad_FD - dots_F[:, None] * rows_FD
    return dots_F, rest_FD.square().sum(1)


def _pack(z_Bc: Tensor, bound: Tensor, block: Block, packed: Packed) -> None:
    """Pack what lies above a bound, as the kernel does."""
    bound = bound[block.first : block.last] if bound.dim() else bound
    kept_Bc = z_Bc > bound
    cells = slice(block.first_piece, block.first_piece + block.pieces)
    counts_BP = torch.stack([part.sum(1) for part in torch.split(kept_Bc, PIECE_LATENTS, dim=1)], 1)
    found, entries = int(packed.found), int(counts_BP.sum())
    packed.counts_BP[:, cells] = counts_BP
    packed.starts_BP[:, cells] = found + (counts_BP.view(-1).cumsum(0) - counts_BP.view(-1)).view_as(counts_BP)
    packed.found.add_(entries)
    if found + entries <= len(packed.values_s):
        packed.values_s[found : found + entries] = z_Bc[kept_Bc]
        packed.latents_s[found : found + entries] = block.first + kept_Bc.nonzero()[:, 1].int()


def _sums_traffic(weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor) -> tuple[int, int]:
    """Count the bytes that sums over groups read and write: a row of the table for each entry."""
    row = table_XD.shape[1] * table_XD.element_size()
    read = len(weight_n) * row + sum(map(extent, (weight_n, index_n, groups.order_n, groups.ends)))
    return read, (len(groups.ends) - 1) * (row + table_XD.element_size())
