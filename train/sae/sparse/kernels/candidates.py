"""The encoder's product of which only what reaches a bound is written: z is never in memory.

A first kernel computes z tile by tile, and writes of a tile the entries that reach the bound of their token into slots
of its own, by token and then latent, with the number of them up to each token. A second one, told where each token's
entries begin, brings them into that order over all tiles. No program adds to another's numbers, so that the result is
the same from run to run.
Letters: B tokens in a batch, D model width, F latents, R tiles of tokens, T tiles of latents, S slots, n entries.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.sae.sparse.candidates import LATENTS, TOKENS, Tiles, tiles_of
from train.sae.sparse.product import Product

DEPTH = 32  # entries of D that are multiplied at a time
PRODUCT_WARPS = 8  # so that the positions of a tile's entries fit into registers beside them
TILES = 256  # whose entries of a token are brought into order together


@triton.jit
@no_type_check
def product_above_kernel(
    x_BD, W_FD, bias_F, bounds_B, values_S, latents_S, ends_RTB, B, F, D, slots,
    BIAS: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
    TOKENS: tl.constexpr, LATENTS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute one tile of z, and write what is not below the bounds, NaN included, as far as there are slots."""
    # Programs beside each other share a tile of W, which is the larger factor.
    token_tile, latent_tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = token_tile * TOKENS + tl.arange(0, TOKENS)
    latent = latent_tile * LATENTS + tl.arange(0, LATENTS)
    dtype = bounds_B.dtype.element_ty
    z = tl.zeros([TOKENS, LATENTS], dtype=dtype)
    for first in range(0, D, DEPTH):
        inner = first + tl.arange(0, DEPTH)
        there = (token < B)[:, None] & (inner < D)[None, :]
        x = tl.load(x_BD + token[:, None].to(tl.int64) * D + inner[None, :], mask=there, other=0.0)
        there = (latent < F)[:, None] & (inner < D)[None, :]
        W = tl.load(W_FD + latent[:, None] * D + inner[None, :], mask=there, other=0.0)
        if ROUND:
            x, W = x.to(tl.bfloat16), W.to(tl.bfloat16)
        z = tl.dot(x, tl.trans(W), z, input_precision=PRECISION, out_dtype=dtype)
    if BIAS:
        z += tl.load(bias_F + latent, mask=latent < F, other=0.0)[None, :]
    bound = tl.load(bounds_B + token, mask=token < B, other=0.0)
    kept = ((token < B)[:, None] & (latent < F)[None, :] & ~(z < bound[:, None])).to(tl.int32)
    ends = tl.cumsum(tl.sum(kept, 1), 0)
    tile = token_tile.to(tl.int64) * tl.num_programs(1) + latent_tile
    tl.store(ends_RTB + tile * TOKENS + tl.arange(0, TOKENS), ends)
    slot = (ends - tl.sum(kept, 1))[:, None] + tl.cumsum(kept, 1) - kept
    written = (kept != 0) & (slot < slots)
    tl.store(values_S + tile * slots + slot, z, mask=written)
    tl.store(latents_S + tile * slots + slot, latent[None, :].to(tl.int32), mask=written)


@triton.jit
@no_type_check
def order_entries_kernel(
    values_S, latents_S, ends_RTB, starts_B, limits_B, out_values_n, out_latents_n, T, slots,
    TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Bring one token's entries from the tiles' slots to where they stand among all, up to its limit."""
    token = tl.program_id(0)
    row_tile, row = (token // TOKENS).to(tl.int64), token % TOKENS
    place = tl.load(starts_B + token)
    limit = tl.load(limits_B + token)
    for first in range(0, T, TILES):
        tile = first + tl.arange(0, TILES)
        there = tile < T
        end_at = (row_tile * T + tile) * TOKENS + row
        end = tl.load(ends_RTB + end_at, mask=there, other=0)
        begin = tl.load(ends_RTB + end_at - 1, mask=there & (end_at % TOKENS > 0), other=0)
        count = end - begin
        target = place + tl.cumsum(count, 0) - count
        for number in range(0, tl.max(count, 0)):
            slot = begin + number
            copied = (number < count) & (slot < slots) & (target + number < limit)
            source = (row_tile * T + tile) * slots + slot
            tl.store(out_values_n + target + number, tl.load(values_S + source, mask=copied, other=0.0), mask=copied)
            latent = tl.load(latents_S + source, mask=copied, other=0)
            tl.store(out_latents_n + target + number, latent, mask=copied)
        place += tl.sum(count, 0)


def product_above(product: Product, bounds_B: Tensor, slots: int) -> Tiles:
    """Compute z, and keep what is not below the bound of its token, in tiles of so many slots each."""
    x_BD, W_FD, bias_F = product.xc_BD.contiguous(), product.W_enc_FD, product.bias_F
    assert W_FD.is_contiguous() and bounds_B.is_contiguous() and (bias_F is None or bias_F.is_contiguous())
    shape = tiles_of(product.rows, product.width)
    values_S, ends_RTB = x_BD.new_empty(*shape, slots), bounds_B.new_empty(*shape, TOKENS, dtype=torch.int32)
    latents_S = torch.empty_like(values_S, dtype=torch.int32)
    rounded = product.matmul == "bf16"
    if rounded and not x_BD.is_cuda:  # the interpreter multiplies no bfloat16: the same rounding before
        x_BD, W_FD = x_BD.bfloat16().to(x_BD.dtype), W_FD.bfloat16().to(W_FD.dtype)
        rounded = False
    exact = rounded or torch.get_float32_matmul_precision() == "highest"
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(x_BD.get_device()):
        product_above_kernel[shape](
            x_BD, W_FD, W_FD if bias_F is None else bias_F, bounds_B, values_S, latents_S, ends_RTB,
            product.rows, product.width, W_FD.shape[1], slots,
            BIAS=bias_F is not None, ROUND=rounded, PRECISION="ieee" if exact else "tf32",
            TOKENS=TOKENS, LATENTS=LATENTS, DEPTH=DEPTH, num_warps=PRODUCT_WARPS,
        )  # fmt: skip
    return Tiles(values_S, latents_S, ends_RTB)


def order_entries(tiles: Tiles, starts_B: Tensor, limits_B: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Bring the entries of each token to the places from its start to before its limit: values and latents, [room].

    Where nothing comes the value is -inf, and the latent 0.
    """
    assert starts_B.is_contiguous() and limits_B.is_contiguous()
    values_n = tiles.values_S.new_full((room,), -torch.inf)
    latents_n = tiles.latents_S.new_zeros(room)
    with torch.cuda.device(values_n.get_device()):
        order_entries_kernel[(len(starts_B),)](
            *tiles, starts_B, limits_B, values_n, latents_n, tiles.ends_RTB.shape[1], tiles.values_S.shape[2],
            TOKENS=TOKENS, TILES=TILES,
        )  # fmt: skip
    return values_n, latents_n
