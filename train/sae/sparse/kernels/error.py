"""Reconstructions, their errors and the gradient's dots in one pass over the rows that a token's entries name.

Several prefixes of the latents reconstruct each by themselves: a token's entries are in order, so those of a prefix are
the first so many, and its error is that of the prefix before with the entries in between.
Letters: B tokens in a batch, D width of what is reconstructed, F latents, n entries, P prefixes, X = B P.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ENTRIES = 4096  # entries of W_dec that a program holds at a time
WARPS = 16  # so that these are 8 a thread: with 16 it would need more registers than leave room for others
MORE = 16  # entries beyond them that it holds of a token: few tokens have any


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
    values_n, latents_n, ends, W_dec_FD, base, base_stride, target_BD, errors_XD, squares_B, last_B, dots_n, D,
    PREFIXES: tl.constexpr, ZEROS: tl.constexpr, TILE: tl.constexpr, MORE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Take one token, piece by piece of D: once all entries of a prefix are added, the piece of its error is complete.

    Of each prefix its error and those of all longer ones are left, added up: its entries are in all of these.
    """
    token = tl.program_id(0).to(tl.int64)
    start = tl.load(ends + token * PREFIXES)
    last_end = tl.load(ends + (token + 1) * PREFIXES)
    dtype = W_dec_FD.dtype.element_ty
    square = tl.zeros([COLUMNS], dtype=dtype)
    last_square = tl.zeros([COLUMNS], dtype=dtype)
    dots = tl.zeros([TILE, COLUMNS], dtype=dtype)
    for left in range(0, D, COLUMNS):
        column = left + tl.arange(0, COLUMNS)
        inside = column < D
        error = tl.load(base + token * base_stride + column, mask=inside, other=0.0)
        error -= tl.load(target_BD + token * D + column, mask=inside, other=0.0)
        # The first tile's rows stay in registers for the dots; with no more entries than a tile these are all.
        entry, value, rows = _rows_of(values_n, latents_n, W_dec_FD, start, last_end, column, D, ZEROS, TILE)
        begin = start
        for prefix in range(PREFIXES):
            end = tl.load(ends + token * PREFIXES + prefix + 1)
            for first in range(tl.maximum(start + TILE, begin), end, MORE):
                _, more, others = _rows_of(values_n, latents_n, W_dec_FD, first, end, column, D, ZEROS, MORE)
                error += tl.sum(more[:, None] * others, 0)
            own = (entry >= begin) & (entry < end)
            error += tl.sum(tl.where(own[:, None], value[:, None] * rows, 0.0), 0)
            dots += tl.where((entry < end)[:, None], rows * error[None, :], 0.0)
            square += error * error
            tl.store(errors_XD + (token * PREFIXES + prefix) * D + column, error, mask=inside)
            begin = end
        last_square += error * error
        if PREFIXES > 1:
            tl.debug_barrier()  # what other threads of this program have written is read; it comes from the cache
            for back in range(2, PREFIXES + 1):
                place = errors_XD + ((token + 1) * PREFIXES - back) * D + column
                error += tl.load(place, mask=inside, other=0.0)
                tl.store(place, error, mask=inside)
    entry = start + tl.arange(0, TILE)
    tl.store(dots_n + entry, tl.sum(dots, 1), mask=entry < last_end)
    tl.store(squares_B + token, tl.sum(square, 0))
    tl.store(last_B + token, tl.sum(last_square, 0))
    if start + TILE < last_end:
        tl.debug_barrier()  # likewise
        begin = start
        for prefix in range(PREFIXES):
            end = tl.load(ends + token * PREFIXES + prefix + 1)
            for first in range(tl.maximum(start + TILE, begin), end, MORE):
                more_dots = tl.zeros([MORE, COLUMNS], dtype=dtype)
                for left in range(0, D, COLUMNS):
                    column = left + tl.arange(0, COLUMNS)
                    _, _, others = _rows_of(values_n, latents_n, W_dec_FD, first, end, column, D, ZEROS, MORE)
                    place = errors_XD + (token * PREFIXES + prefix) * D + column
                    more_dots += others * tl.load(place, mask=column < D, other=0.0)[None, :]
                another = first + tl.arange(0, MORE)
                tl.store(dots_n + another, tl.sum(more_dots, 1), mask=another < end)
            begin = end


def tile_of(entries: int, tokens: int) -> int:
    """Choose how many entries of a token are read together: most tokens should need one tile."""
    typical = 3 * entries // (2 * max(1, tokens))
    return max(16, min(128, int(triton.next_power_of_2(max(1, typical)))))


def decode_error(
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
    """Compute e_p = f[:, :bound_p] W_dec[:bound_p] + base - target of each prefix, and what its gradients need.

    `ends` says where the entries of each token and prefix begin, and where the last ones end: [X + 1]. Gives the sums
    over q >= p of e_q [X, D], a token's prefixes one after another; the tokens' sums over prefixes of ||e_p||^2 [B];
    ||e_P||^2 alone [B]; the dot of each entry's row of W_dec with the sum of its first prefix [n], 0 for a value of 0
    but with `through_zeros`. `base` is one row [D] or one for each token [B, D].
    """
    assert latents_n.is_contiguous() and ends.is_contiguous()
    values_n, W_dec_FD, target_BD = values_n.contiguous(), W_dec_FD.contiguous(), target_BD.contiguous()
    base = base.contiguous()
    tokens, width = target_BD.shape
    assert len(ends) == tokens * prefixes + 1
    errors_XD = target_BD.new_empty(tokens * prefixes, width)
    squares_B, last_B = target_BD.new_empty(tokens), target_BD.new_empty(tokens)
    dots_n = torch.empty_like(values_n)
    tile = tile_of(len(values_n), tokens)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(errors_XD.get_device()):
        decode_error_kernel[(tokens,)](
            values_n,
            latents_n,
            ends,
            W_dec_FD,
            base,
            width if base.dim() == 2 else 0,
            target_BD,
            errors_XD,
            squares_B,
            last_B,
            dots_n,
            width,
            PREFIXES=prefixes,
            ZEROS=through_zeros,
            TILE=tile,
            MORE=MORE,
            COLUMNS=TILE_ENTRIES // tile,
            num_warps=WARPS,
        )
    return errors_XD, squares_B, last_B, dots_n
