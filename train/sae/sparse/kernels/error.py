"""Reconstruction, its error and the gradient's dots in one pass over the rows that a token's entries name.

Letters: B tokens in a batch, D width of what is reconstructed, F latents, n entries.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ENTRIES = 4096  # entries of W_dec that a program holds at a time
WARPS = 8  # so that these are 16 a thread


@triton.jit
@no_type_check
def _rows_of(values_n, latents_n, W_dec_FD, first, end, column, D, ZEROS: tl.constexpr, TILE: tl.constexpr):
    """Read TILE entries: their numbers, values, and a piece of their rows; those of value 0 only with ZEROS."""
    entry = first + tl.arange(0, TILE)
    value = tl.load(values_n + entry, mask=entry < end, other=0.0)
    latent = tl.load(latents_n + entry, mask=entry < end, other=0)
    read = entry < end
    if not ZEROS:
        read = value != 0
    there = read[:, None] & (column < D)[None, :]
    return entry, value, tl.load(W_dec_FD + latent[:, None] * D + column[None, :], mask=there, other=0.0)


@triton.jit
@no_type_check
def decode_error_kernel(
    values_n, latents_n, row_ends, W_dec_FD, base, base_stride, target_BD, error_BD, squares_B, dots_n, D,
    ZEROS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Take one token, piece by piece of D: once all of its entries are added, the piece of its error is complete."""
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(row_ends + token)
    end = tl.load(row_ends + token + 1)
    dtype = W_dec_FD.dtype.element_ty
    square = tl.zeros([COLUMNS], dtype=dtype)
    dots = tl.zeros([TILE, COLUMNS], dtype=dtype)
    for left in range(0, D, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        inside = column < D
        error = tl.load(base + token * base_stride + column, mask=inside, other=0.0)
        error -= tl.load(target_BD + token * D + column, mask=inside, other=0.0)
        # The first tile's rows stay in registers for the dots; with no more entries than a tile these are all.
        for first in range(start + TILE, end, TILE):
            _, value, rows = _rows_of(values_n, latents_n, W_dec_FD, first, end, column, D, ZEROS, TILE)
            error += tl.sum(value[:, None] * rows, 0)
        _, value, rows = _rows_of(values_n, latents_n, W_dec_FD, start, end, column, D, ZEROS, TILE)
        error += tl.sum(value[:, None] * rows, 0)
        dots += rows * error[None, :]
        square += error * error
        tl.store(error_BD + token * D + column, error, mask=inside)
    entry = start + tl.arange(0, TILE)
    tl.store(dots_n + entry, tl.sum(dots, 1), mask=entry < end)
    tl.store(squares_B + token, tl.sum(square, 0))
    if start + TILE < end:
        tl.debug_barrier()  # the error that other threads of this program have written is read
        for first in range(start + TILE, end, TILE):
            dots = tl.zeros([TILE, COLUMNS], dtype=dtype)
            for left in range(0, D, COLUMNS):
                column = left + tl.arange(0, COLUMNS)
                entry, _, rows = _rows_of(values_n, latents_n, W_dec_FD, first, end, column, D, ZEROS, TILE)
                error = tl.load(error_BD + token * D + column, mask=column < D, other=0.0)
                dots += rows * error[None, :]
            entry = first + tl.arange(0, TILE)
            tl.store(dots_n + entry, tl.sum(dots, 1), mask=entry < end)


def tile_of(entries: int, tokens: int) -> int:
    """Choose how many entries of a token are read together: most tokens should need one tile."""
    typical = 3 * entries // (2 * max(1, tokens))
    return max(16, min(128, int(triton.next_power_of_2(max(1, typical)))))


def decode_error(
    values_n: Tensor,
    latents_n: Tensor,
    row_ends: Tensor,
    W_dec_FD: Tensor,
    base: Tensor,
    target_BD: Tensor,
    *,
    through_zeros: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute e = f W_dec + base - target [B, D], the tokens' ||e||^2 [B], and e_b . W_dec_j of each entry [n].

    An entry of value 0 has the dot 0, but with `through_zeros`. `base` is one row [D] or one for each token [B, D].
    """
    assert latents_n.is_contiguous() and row_ends.is_contiguous()
    values_n, W_dec_FD, target_BD = values_n.contiguous(), W_dec_FD.contiguous(), target_BD.contiguous()
    base = base.contiguous()
    tokens, width = target_BD.shape
    error_BD, squares_B = torch.empty_like(target_BD), target_BD.new_empty(tokens)
    dots_n = torch.empty_like(values_n)
    tile = tile_of(len(values_n), tokens)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(error_BD.get_device()):
        decode_error_kernel[(tokens,)](
            values_n,
            latents_n,
            row_ends,
            W_dec_FD,
            base,
            width if base.dim() == 2 else 0,
            target_BD,
            error_BD,
            squares_B,
            dots_n,
            width,
            ZEROS=through_zeros,
            TILE=tile,
            COLUMNS=TILE_ENTRIES // tile,
            num_warps=WARPS,
        )
    return error_BD, squares_B, dots_n
