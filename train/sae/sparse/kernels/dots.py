"""Dots of two tables' rows, at the places of entries. Letters: n entries, X rows of a table, D its width, F latents."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.sae.sparse.kernels.launch import ENTRIES, columns_of_rows


@triton.jit
@no_type_check
def entry_dots_kernel(rows_n, latents_n, left_XD, right_FD, out_n, n, D, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute the dots of TILE entries."""
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = tl.load(rows_n + entry, mask=entry < n, other=0)
    latent = tl.load(latents_n + entry, mask=entry < n, other=0)
    total = tl.zeros([TILE], dtype=out_n.dtype.element_ty)
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = (entry < n)[:, None] & (column < D)[None, :]
        left = tl.load(left_XD + row[:, None] * D + column[None, :], mask=there, other=0.0)
        right = tl.load(right_FD + latent[:, None] * D + column[None, :], mask=there, other=0.0)
        total += tl.sum(left * right, 1)
    tl.store(out_n + entry, total, mask=entry < n)


def entry_dots(rows_n: Tensor, latents_n: Tensor, left_XD: Tensor, right_FD: Tensor) -> Tensor:
    """Compute left[row] . right[latent] of each entry: [n]."""
    assert rows_n.is_contiguous() and latents_n.is_contiguous()
    left_XD, right_FD, n = left_XD.contiguous(), right_FD.contiguous(), len(rows_n)
    out_n, width = right_FD.new_empty(n), right_FD.shape[1]
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(out_n.get_device()):
        entry_dots_kernel[(triton.cdiv(n, ENTRIES),)](
            rows_n, latents_n, left_XD, right_FD, out_n, n, width, TILE=ENTRIES, COLUMNS=columns_of_rows(width)
        )
    return out_n
