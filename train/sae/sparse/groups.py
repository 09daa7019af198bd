"""Entries in groups, such as those of each latent: an order, where each group ends, and the pieces of long groups.

Letters: n entries, G groups of them, P pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PIECE_ENTRIES = 64  # entries of a piece, at most; a group of more entries is cut


class GroupPieces(NamedTuple):
    """The pieces of long groups, room for as many as there can be: their number is the device's alone."""

    ends: Tensor
    """Where each group's pieces begin, and where the last one's end: [G + 1]."""
    groups_P: Tensor
    """The group of each piece; of those beyond the last piece any."""


class Groups(NamedTuple):
    """Entries by group."""

    index_n: Tensor
    """The group of each entry."""
    order_n: Tensor
    """The entries' numbers, group by group."""
    ends: Tensor
    """Where each group begins in that order, and where the last one ends: [G + 1]."""
    pieces: GroupPieces | None = None
    """Those of long groups, where the backend cuts them and any can be long."""


def cut_groups(ends: Tensor, entries: int) -> GroupPieces | None:
    """Cut the groups that end at `ends`; None where none of so many entries can be long. Asks the device nothing."""
    if entries <= PIECE_ENTRIES:
        return None
    counts_G = ends.diff()
    filled_G = (counts_G + (PIECE_ENTRIES - 1)).div(PIECE_ENTRIES, rounding_mode="floor")
    pieces_G = torch.where(counts_G > PIECE_ENTRIES, filled_G, 0)
    piece_ends = torch.zeros_like(ends)
    torch.cumsum(pieces_G, 0, out=piece_ends[1:])
    # A group of more entries than a piece has fewer pieces than twice its entries would fill.
    most = 2 * entries // PIECE_ENTRIES
    piece_P = torch.arange(most, dtype=ends.dtype, device=ends.device)
    return GroupPieces(piece_ends, torch.searchsorted(piece_ends, piece_P, right=True) - 1)
