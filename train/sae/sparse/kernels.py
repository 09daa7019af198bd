"""Triton kernels of the sparse products, for a GPU or for Triton's interpreter: imported where they are needed.

Sums are taken in the tables' own dtype (float32; float64 in tests), for any D, each by one program in a fixed order.
Letters: G groups of entries, n entries, X rows of a table, D its width.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 16  # entries whose rows are read together, so that their loads overlap
_COLUMNS = 256  # entries of D a program holds


@triton.jit
@no_type_check
def _gather_sums(weight_n, index_n, ends, table_XD, out_GD, D, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum one group over a piece of D; entries of weight 0 are not read."""
    # 64 bits: group * D goes beyond 2^31 for a wide SAE's decoder.
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + group)
    end = tl.load(ends + group + 1)
    total = tl.zeros([COLUMNS], dtype=out_GD.dtype.element_ty)
    for first in range(start, end, TILE):
        entry = first + tl.arange(0, TILE)
        weight = tl.load(weight_n + entry, mask=entry < end, other=0.0)
        index = tl.load(index_n + entry, mask=entry < end, other=0)
        # What fills a selection up has weight 0. Not reading its row saves bandwidth, and keeps a NaN there from
        # spreading (0 * NaN is NaN).
        there = (weight != 0)[:, None] & (column < D)[None, :]
        rows = tl.load(table_XD + index[:, None] * D + column[None, :], mask=there, other=0.0)
        total += tl.sum(weight[:, None] * rows, 0)
    tl.store(out_GD + group * D + column, total, mask=column < D)


@triton.jit
@no_type_check
def _entry_dots(rows_n, latents_n, left_BD, right_FD, out_n, n, D, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute the dots of TILE entries."""
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.load(rows_n + entry, mask=entry < n, other=0)
    latent = tl.load(latents_n + entry, mask=entry < n, other=0)
    total = tl.zeros([TILE], dtype=out_n.dtype.element_ty)
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = (entry < n)[:, None] & (column < D)[None, :]
        left = tl.load(left_BD + row[:, None] * D + column[None, :], mask=there, other=0.0)
        right = tl.load(right_FD + latent[:, None] * D + column[None, :], mask=there, other=0.0)
        total += tl.sum(left * right, 1)
    tl.store(out_n + entry, total, mask=entry < n)


@triton.jit
@no_type_check
def _project_rows(grad_FD, rows_FD, D, COLUMNS: tl.constexpr):
    """Project one row, whole."""
    column = tl.arange(0, COLUMNS)
    place = tl.program_id(0).to(tl.int64) * D + column
    grad = tl.load(grad_FD + place, mask=column < D, other=0.0)
    row = tl.load(rows_FD + place, mask=column < D, other=0.0)
    tl.store(grad_FD + place, grad - tl.sum(grad * row, 0) * row, mask=column < D)


def _columns(width: int) -> int:
    return min(_COLUMNS, int(triton.next_power_of_2(width)))


def warps_for_row(columns: int) -> int:
    """Choose the warps of a program that holds two whole rows of so many columns in registers.

    With 4 warps a row of 16,384 columns takes more registers than a thread has, and spills to memory; 32 hold it.
    """
    return 4 if columns <= 4096 else 8 if columns <= 8192 else 32


def gather_sums(weight_n: Tensor, index_n: Tensor, ends: Tensor, table_XD: Tensor) -> Tensor:
    """Sum weight * table[index] over each group of entries, from `ends` to the next: [groups, D]."""
    assert index_n.is_contiguous() and ends.is_contiguous()
    table_XD, width = table_XD.contiguous(), table_XD.shape[1]
    out_GD = table_XD.new_empty(len(ends) - 1, width)
    columns = _columns(width)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(out_GD.get_device()):
        _gather_sums[(len(out_GD), triton.cdiv(width, columns))](
            weight_n.contiguous(), index_n, ends, table_XD, out_GD, width, TILE=_TILE, COLUMNS=columns
        )
    return out_GD


def entry_dots(rows_n: Tensor, latents_n: Tensor, left_BD: Tensor, right_FD: Tensor) -> Tensor:
    """Compute left[row] . right[latent] of each entry: [n]."""
    assert rows_n.is_contiguous() and latents_n.is_contiguous()
    left_BD, right_FD, n = left_BD.contiguous(), right_FD.contiguous(), len(rows_n)
    out_n, width = right_FD.new_empty(n), right_FD.shape[1]
    with torch.cuda.device(out_n.get_device()):
        _entry_dots[(triton.cdiv(n, _TILE),)](
            rows_n, latents_n, left_BD, right_FD, out_n, n, width, TILE=_TILE, COLUMNS=_columns(width)
        )
    return out_n


def project_rows_(grad_FD: Tensor, rows_FD: Tensor) -> None:
    """Take from each row of grad its part along the (unit) row of `rows_FD`."""
    assert grad_FD.is_contiguous() and rows_FD.is_contiguous()
    width = rows_FD.shape[1]
    columns = int(triton.next_power_of_2(width))
    with torch.cuda.device(grad_FD.get_device()):
        _project_rows[(len(grad_FD),)](grad_FD, rows_FD, width, COLUMNS=columns, num_warps=warps_for_row(columns))
