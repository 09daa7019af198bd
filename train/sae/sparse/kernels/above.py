"""What lies above a bound: z is read once, and its entries are packed into memory that is set aside for them.

Each program packs one piece of a row. It takes room for its entries by a counter, so where they lie depends on which
program comes first; where each piece's entries lie is noted, and by that they are put in order afterwards.
Letters: B tokens in a batch, c latents of a block, P pieces of a row, s entries there is room for.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.sae.sparse.above import PIECE_LATENTS, Block, Packed


@triton.jit
@no_type_check
def pack_above_kernel(
    z_Bc, bound, bound_stride, latents_s, values_s, found, starts_BP, counts_BP, room, first, width, pieces,
    first_piece, all_pieces, PIECE: tl.constexpr,
):  # fmt: skip
    """Pack the entries above the bound of PIECE neighbours of a row, in order; what finds no room is only counted."""
    # 64 bits: a row begins beyond 2^31 entries of a large block.
    program = tl.program_id(0).to(tl.int64)
    row = program // pieces
    piece = program % pieces
    place = piece * PIECE + tl.arange(0, PIECE)
    inside = place < width
    latent = first + place
    z = tl.load(z_Bc + row * width + place, mask=inside, other=0.0)
    least = tl.load(bound + latent * bound_stride, mask=inside, other=0.0)
    above = (z > least) & inside  # of NaN nothing
    count = tl.sum(above.to(tl.int32), 0)
    cell = row * all_pieces + first_piece + piece
    tl.store(counts_BP + cell, count)
    if count > 0:
        start = tl.atomic_add(found, count.to(tl.int64), sem="relaxed")
        tl.store(starts_BP + cell, start)
        offset = tl.cumsum(above.to(tl.int32), 0) - 1
        there = above & (start + offset < room)
        tl.store(latents_s + start + offset, latent.to(tl.int32), mask=there)
        tl.store(values_s + start + offset, z, mask=there)


def pack_above(z_Bc: Tensor, bound: Tensor, block: Block, packed: Packed) -> None:
    """Add the entries above the bound, one or one for each latent, of a block of z."""
    assert z_Bc.is_contiguous() and bound.is_contiguous() and z_Bc.dtype == bound.dtype
    width, pieces = z_Bc.shape[1], block.pieces
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(z_Bc.get_device()):
        pack_above_kernel[(len(z_Bc) * pieces,)](
            z_Bc, bound, bound.dim(), packed.latents_s, packed.values_s, packed.found, packed.starts_BP,
            packed.counts_BP, len(packed.values_s), block.first, width, pieces, block.first_piece,
            packed.counts_BP.shape[1], PIECE=PIECE_LATENTS,
        )  # fmt: skip
