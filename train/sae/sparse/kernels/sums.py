"""Sums of weighted rows over groups of entries: f W_dec by token, and the gradients of both matrices by latent.

A latent that is active on half of all tokens would be one long program that the others wait for. So a group of more
than PIECE_ENTRIES is cut: a first kernel sums its pieces, and the second adds those in order, which it does for a short
group with the entries themselves. How many pieces there are is known to the device alone; their greatest number
follows from the number of entries. A gradient's row is made whole by one program, which then knows its norm.
Letters: n entries, G groups of them, P pieces, X rows of a table, D its width.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.sae.sparse.groups import PIECE_ENTRIES, GroupPieces, Groups
from train.sae.sparse.kernels.launch import ENTRIES, columns_of_rows, tile_of_rows, warps_of_tile
from train.sae.sparse.row_norms import RowNorms


@triton.jit
@no_type_check
def _sum_entries(
    weight_n, index_n, order_n, table_XD, start, end, column, D,
    ORDERED: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the rows of entries over a piece of D, and their weights; entries of weight 0 are not read."""
    dtype = table_XD.dtype.element_ty
    total = tl.zeros([COLUMNS], dtype=dtype)
    weights = tl.zeros([TILE], dtype=dtype)
    for first in range(start, end, TILE):
        entry = first + tl.arange(0, TILE)
        inside = entry < end
        if ORDERED:
            entry = tl.load(order_n + entry, mask=inside, other=0)
        weight = tl.load(weight_n + entry, mask=inside, other=0.0)
        index = tl.load(index_n + entry, mask=inside, other=0)
        # What fills a selection up has weight 0. Not reading its row saves bandwidth, and keeps a NaN there from
        # spreading (0 * NaN is NaN).
        there = (weight != 0)[:, None] & (column < D)[None, :]
        rows = tl.load(table_XD + index[:, None] * D + column[None, :], mask=there, other=0.0)
        total += tl.sum(weight[:, None] * rows, 0)
        weights += weight
    return total, tl.sum(weights, 0)


@triton.jit
@no_type_check
def piece_sums_kernel(
    weight_n, index_n, order_n, ends, piece_ends, groups_P, table_XD, parts_PD, weights_P, groups, D,
    ORDERED: tl.constexpr, PIECE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum one piece of a long group."""
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if piece < tl.load(piece_ends + groups):
        group = tl.load(groups_P + piece)
        start = tl.load(ends + group) + (piece - tl.load(piece_ends + group)) * PIECE
        end = tl.minimum(start + PIECE, tl.load(ends + group + 1))
        total, weight = _sum_entries(
            weight_n, index_n, order_n, table_XD, start, end, column, D, ORDERED, TILE, COLUMNS
        )
        tl.store(parts_PD + piece * D + column, total, mask=column < D)
        if tl.program_id(1) == 0:
            tl.store(weights_P + piece, weight)


@triton.jit
@no_type_check
def _sum_group(
    weight_n, index_n, order_n, ends, piece_ends, table_XD, parts_PD, weights_P, group, column, D,
    ORDERED: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum one group over a piece of D, and its weights: its pieces where it is long, else its entries."""
    start = tl.load(ends + group)
    end = tl.load(ends + group + 1)
    if CUT:
        first_piece = tl.load(piece_ends + group)
        last_piece = tl.load(piece_ends + group + 1)
        if last_piece > first_piece:
            end = start  # its entries are in the pieces
    total, weight = _sum_entries(weight_n, index_n, order_n, table_XD, start, end, column, D, ORDERED, TILE, COLUMNS)
    if CUT:
        for piece in range(first_piece, last_piece):
            total += tl.load(parts_PD + piece * D + column, mask=column < D, other=0.0)
            weight += tl.load(weights_P + piece)
    return total, weight


@triton.jit
@no_type_check
def group_sums_kernel(
    weight_n, index_n, order_n, ends, piece_ends, table_XD, parts_PD, weights_P, out_GD, weights_G, D,
    ORDERED: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum one group."""
    # 64 bits: group * D goes beyond 2^31 for a wide SAE's decoder.
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total, weight = _sum_group(
        weight_n, index_n, order_n, ends, piece_ends, table_XD, parts_PD, weights_P, group, column, D,
        ORDERED, CUT, TILE, COLUMNS,
    )  # fmt: skip
    tl.store(out_GD + group * D + column, total, mask=column < D)
    if tl.program_id(1) == 0:
        tl.store(weights_G + group, weight)


@triton.jit
@no_type_check
def gradient_rows_kernel(
    weight_n, index_n, order_n, ends, piece_ends, table_XD, parts_PD, weights_P, unit_GD,
    out_GD, weights_G, dots_G, squares_G, D,
    CUT: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum one group as `group_sums_kernel` does, a whole row at once, and sum its squares while it is in registers."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    total, weight = _sum_group(
        weight_n, index_n, order_n, ends, piece_ends, table_XD, parts_PD, weights_P, group, column, D,
        True, CUT, TILE, COLUMNS,
    )  # fmt: skip
    tl.store(out_GD + group * D + column, total, mask=column < D)
    tl.store(weights_G + group, weight)
    if UNIT:
        along = tl.load(unit_GD + group * D + column, mask=column < D, other=0.0)
        dot = tl.sum(total * along, 0)
        tl.store(dots_G + group, dot)
        # From the difference itself: the difference of two squares would lose what is small beside the part that goes.
        total -= dot * along
    tl.store(squares_G + group, tl.sum(total * total, 0))


def group_sums(
    weight_n: Tensor,
    index_n: Tensor,
    ends: Tensor,
    table_XD: Tensor,
    order_n: Tensor | None = None,
    pieces: GroupPieces | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum weight * table[index], and weight, over each group of entries from `ends` to the next: [G, D] and [G].

    The entries are those that `order_n` numbers, in its order, or all in their own. Without `pieces` no group is cut.
    """
    assert index_n.is_contiguous() and ends.is_contiguous() and (order_n is None or order_n.is_contiguous())
    weight_n, table_XD, width = weight_n.contiguous(), table_XD.contiguous(), table_XD.shape[1]
    groups = len(ends) - 1
    out_GD, weights_G = table_XD.new_empty(groups, width), table_XD.new_empty(groups)
    columns = columns_of_rows(width)
    entries = (
        weight_n,
        index_n,
        index_n if order_n is None else order_n,
        ends,
        ends if pieces is None else pieces.ends,
    )
    ordered = order_n is not None
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(out_GD.get_device()):
        parts_PD, weights_P = _piece_sums(entries, pieces, table_XD, groups, ordered)
        group_sums_kernel[(groups, triton.cdiv(width, columns))](
            *entries, table_XD, parts_PD, weights_P, out_GD, weights_G, width,
            ORDERED=ordered, CUT=pieces is not None, TILE=ENTRIES, COLUMNS=columns,
        )  # fmt: skip
    return out_GD, weights_G


def gradient_rows(
    weight_n: Tensor, index_n: Tensor, groups: Groups, table_XD: Tensor, unit_GD: Tensor | None
) -> tuple[Tensor, Tensor, RowNorms]:
    """Sum as `group_sums`, over groups with an order, and the squares of each row of the result.

    With `unit_GD`, unit rows, the squares are those of what is left of a row without its part along them.
    """
    assert index_n.is_contiguous() and groups.ends.is_contiguous() and groups.order_n.is_contiguous()
    assert unit_GD is None or unit_GD.is_contiguous()
    weight_n, table_XD, width = weight_n.contiguous(), table_XD.contiguous(), table_XD.shape[1]
    count, pieces = len(groups.ends) - 1, groups.pieces
    out_GD = table_XD.new_empty(count, width)
    weights_G, dots_G, squares_G = (table_XD.new_empty(count) for _ in range(3))
    entries = (weight_n, index_n, groups.order_n, groups.ends, groups.ends if pieces is None else pieces.ends)
    columns = int(triton.next_power_of_2(width))
    tile = tile_of_rows(columns)
    with torch.cuda.device(out_GD.get_device()):
        parts_PD, weights_P = _piece_sums(entries, pieces, table_XD, count, ordered=True)
        gradient_rows_kernel[(count,)](
            *entries, table_XD, parts_PD, weights_P, table_XD if unit_GD is None else unit_GD,
            out_GD, weights_G, dots_G, squares_G, width,
            CUT=pieces is not None, UNIT=unit_GD is not None, TILE=tile, COLUMNS=columns,
            num_warps=warps_of_tile(tile * columns),
        )  # fmt: skip
    return out_GD, weights_G, RowNorms(squares_G, None if unit_GD is None else dots_G)


def _piece_sums(
    entries: tuple[Tensor, ...], pieces: GroupPieces | None, table_XD: Tensor, groups: int, ordered: bool
) -> tuple[Tensor, Tensor]:
    """Sum the pieces of long groups; without pieces nothing runs."""
    count, width = 0 if pieces is None else len(pieces.groups_P), table_XD.shape[1]
    parts_PD, weights_P = table_XD.new_empty(count, width), table_XD.new_empty(count)
    if pieces is not None:
        columns = columns_of_rows(width)
        piece_sums_kernel[(count, triton.cdiv(width, columns))](
            *entries, pieces.groups_P, table_XD, parts_PD, weights_P, groups, width,
            ORDERED=ordered, PIECE=PIECE_ENTRIES, TILE=ENTRIES, COLUMNS=columns,
        )  # fmt: skip
    return parts_PD, weights_P
