"""The entries of z above a bound, where their number is the device's alone until the host asks for it, once.

z comes in blocks of latents, which are read once each: what lies above is packed into memory with room for as many
entries as are kept sparse at all. Then the host waits for their number. Either they are put in order, in tensors of
exactly their size, or they are too many for sparse products to pay, and all of z is computed instead.
Letters: B tokens in a batch, F latents, c latents of a block, P pieces of a row, n entries, s there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from train.sae.sparse.product import Product
from train.sae.sparse.rules import Entries

PIECE_LATENTS = 2048  # neighbours of a row that are packed together


class Packed(NamedTuple):
    """Entries in no order, and where those of each piece of a row are: its own are in order."""

    latents_s: Tensor
    """int32."""
    values_s: Tensor
    found: Tensor
    """How many there are, those without room counted too."""
    starts_BP: Tensor
    """Where each piece's entries begin; of a piece without any, anything."""
    counts_BP: Tensor
    """How many entries each piece has."""

    def in_order(self, entries: int) -> Entries:
        """List them, of which there are so many, by row and then latent. Asks the device nothing."""
        ends_p = self.counts_BP.view(-1).cumsum(0)
        number_n = torch.arange(entries, device=ends_p.device)
        piece_n = torch.searchsorted(ends_p, number_n, right=True)
        # From an entry's number in order to where it lies.
        shift_p = self.starts_BP.view(-1) - (ends_p - self.counts_BP.view(-1))
        place_n = number_n + shift_p.index_select(0, piece_n)
        rows_n = piece_n.div(self.counts_BP.shape[1], rounding_mode="floor")
        latents_n = self.latents_s.index_select(0, place_n).long()
        return Entries(rows_n, latents_n, self.values_s.index_select(0, place_n))


class Block(NamedTuple):
    """Where a block of z stands among all."""

    first: int
    """Its first latent."""
    last: int
    """The latent after its last."""
    first_piece: int
    """The number of its first piece, of all pieces of a row."""

    @property
    def pieces(self) -> int:
        """Return how many pieces its rows are cut into."""
        return -(-(self.last - self.first) // PIECE_LATENTS)


Pack = Callable[[Tensor, Tensor, Block, Packed], None]
"""Adds what lies above a bound, of a block of z."""


def select_above(
    product: Product,
    bound: Tensor,
    *,
    block_entries: int,
    dense_share: float,
    pack: Pack,
    read: Callable[[Tensor], int],
) -> Entries | Tensor:
    """Find all z above one bound or one for each latent [F]; all of z where more than `dense_share` of it is.

    `read` gives a number that the device has, and is called once.
    """
    bound = bound.to(product.xc_BD.dtype).contiguous()
    room = int(dense_share * product.rows * product.width)
    blocks = blocks_of(product.blocks(block_entries), product.width)
    packed = room_for(room, blocks, product.xc_BD)
    memory = product.xc_BD.new_empty(product.rows * blocks[0].last)
    for block in blocks:
        z_Bc = memory[: product.rows * (block.last - block.first)].view(product.rows, -1)
        pack(product.block(block.first, block.last, z_Bc), bound, block, packed)
    entries = read(packed.found)
    if entries <= room:
        del memory, z_Bc
        return packed.in_order(entries)
    if len(blocks) == 1:
        return z_Bc
    # Which of the two it is must depend on the batch alone, or a run would not repeat. So nothing is remembered of the
    # steps before, and a wide z is computed again.
    del packed, memory, z_Bc
    return product.block(0, product.width)


def blocks_of(firsts: range, width: int) -> list[Block]:
    """Describe blocks of latents by their pieces' numbers."""
    blocks: list[Block] = []
    first_piece = 0
    for first in firsts:
        blocks.append(Block(first, min(first + firsts.step, width), first_piece))
        first_piece += blocks[-1].pieces
    return blocks


def room_for(entries: int, blocks: list[Block], like_BD: Tensor) -> Packed:
    """Set memory aside for so many entries of as many rows, of these blocks."""
    cells = (len(like_BD), blocks[-1].first_piece + blocks[-1].pieces)
    return Packed(
        like_BD.new_empty(entries, dtype=torch.int32),
        like_BD.new_empty(entries),
        like_BD.new_zeros((), dtype=torch.int64),
        like_BD.new_empty(cells, dtype=torch.int64),
        like_BD.new_empty(cells, dtype=torch.int64),
    )
