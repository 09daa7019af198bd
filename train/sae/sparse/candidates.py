"""A choice of the largest z, of which only what may be chosen is ever in memory.

z of every 16th latent, by a product of its own, bounds the choice from below: of a token the k-th largest of some z is
never above the k-th largest of all, and so for a batch. About 16 times as many entries reach that bound as are chosen,
whatever the values are and whatever the steps before were. A kernel computes all of z and writes those alone, in order;
the choice among them is the choice among all. It is not certain where a tile's slots or a token's room were too few, or
where z has NaN: then z is to be computed anew, and chosen from as a whole.
Letters: B tokens in a batch, F latents, s latents of the sample, R tiles of tokens, T tiles of latents, S slots of a
tile, n entries, L lines of M values.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from train.sae.sparse.product import Product
from train.sae.sparse.rules import TopOfBatch, TopPerToken

SAMPLED = 16  # of so many latents one is in the sample
TOKENS = 64  # of a tile of z
LATENTS = 128  # of a tile of z
_ROOM = 1.5  # times the entries that are likely
_SLOTS = 4  # times the entries that are to be expected of a tile, as latents differ more than tokens
_MARGIN = 0.01  # of the bound, by which it is lowered: two products round differently
_GROUP = 32  # of the entries' room this is a divisor, so that a choice can look at groups


class Tiles(NamedTuple):
    """What reached its bound, tile by tile."""

    values_S: Tensor
    """[R, T, S]."""
    latents_S: Tensor
    """int32 [R, T, S]."""
    ends_RTB: Tensor
    """How many entries of a tile there are up to each of its tokens, those without a slot counted too: int32."""


class Shortlist(NamedTuple):
    """What may be chosen, by token and then latent, and whether the choice may be made of it."""

    values_n: Tensor
    """-inf where there is nothing."""
    latents_n: Tensor
    starts_B: Tensor
    """Where each token's entries begin."""
    certain: Tensor
    """Whether what is to be chosen is among them, on the device."""

    def rows(self, place_n: Tensor) -> Tensor:
        """Find the tokens of the entries at these places."""
        return torch.searchsorted(self.starts_B, place_n, right=True) - 1


@runtime_checkable
class Kernels(Protocol):
    """What computes them."""

    def product_above(self, product: Product, bounds_B: Tensor, slots: int) -> Tiles:
        """Compute z, and keep what is not below the bound of its token, in tiles of so many slots each."""

    def order_entries(self, tiles: Tiles, starts_B: Tensor, limits_B: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Bring each token's values and latents to where they begin, up to a limit, of so many places in all."""


def tiles_of(rows: int, width: int) -> tuple[int, int]:
    """Count the tiles of tokens and of latents."""
    return -(-rows // TOKENS), -(-width // LATENTS)


def can_sample(rule: TopOfBatch | TopPerToken, rows: int, width: int) -> bool:
    """Say whether a sample has as many values as are to be chosen."""
    sampled = -(-width // SAMPLED)
    return rule.k <= sampled if isinstance(rule, TopPerToken) else rule.count <= rows * sampled


def slots_of(chosen: int, rows: int, width: int) -> int:
    """Choose the slots of a tile, where so many entries are chosen in all."""
    tiles_R, tiles_T = tiles_of(rows, width)
    expected = -(-SAMPLED * chosen // (tiles_R * tiles_T))
    return min(TOKENS * LATENTS, max(64, _SLOTS * expected))


def room_of(chosen: int) -> int:
    """Choose for how many candidates there is room, of a line from which so many are chosen."""
    # How many reach the c-th largest of a sample spreads as SAMPLED times a sum of c exponential waits, whose tail is
    # long where c is small: all of thousands of tokens must have room.
    likely = chosen + 5 * math.sqrt(chosen) + 10
    return math.ceil(_ROOM * SAMPLED * likely / _GROUP) * _GROUP


def lower_bound(values_LM: Tensor, count: int) -> Tensor:
    """Find a bound of each line [L] that `count` of its values reach; NaN where the line has so many NaN."""
    lines, width = values_LM.shape
    # The largest of each of `count` groups are `count` values; where few groups hold two, these bound nearly as well as
    # the values themselves, which are then read once.
    group = min(_GROUP, width & -width)
    while group > 1 and width // group < 4 * count:
        group //= 2
    most = values_LM.reshape(lines, -1, group).amax(2) if group > 1 else values_LM
    return most.topk(count, dim=1, sorted=False).values.amin(1)


def find_candidates(product: Product, rule: TopOfBatch | TopPerToken, kernels: Kernels) -> Shortlist:
    """Find what a rule may choose. The host waits for nothing."""
    rows, width, device = product.rows, product.width, product.xc_BD.device
    sample_Bs = product.of(torch.arange(0, width, SAMPLED, device=device))
    batch = isinstance(rule, TopOfBatch)
    chosen = rule.count if isinstance(rule, TopOfBatch) else rule.k * rows
    bound_L = lower_bound(sample_Bs.view(1, -1), chosen) if batch else lower_bound(sample_Bs, chosen // rows)
    bound_L = bound_L - _MARGIN * bound_L.abs()
    slots = slots_of(chosen, rows, width)
    tiles = kernels.product_above(product, bound_L.expand(rows).contiguous(), slots)
    ends_RB = tiles.ends_RTB.sum(1)
    counts_B = ends_RB.diff(dim=1, prepend=torch.zeros_like(ends_RB[:, :1])).view(-1)[:rows]
    if batch:
        room = room_of(chosen)
        starts_B = counts_B.cumsum(0) - counts_B
        limits_B = torch.full_like(starts_B, room)
        total = counts_B.sum()
        enough = (total >= chosen) & (total <= room)
    else:
        each = room_of(chosen // rows)
        room = each * rows
        starts_B = each * torch.arange(rows, device=device)
        limits_B = starts_B + each
        enough = ((counts_B >= chosen // rows) & (counts_B <= each)).all()
    values_n, latents_n = kernels.order_entries(tiles, starts_B, limits_B, room)
    fits = tiles.ends_RTB[:, :, -1].amax() <= slots
    return Shortlist(values_n, latents_n, starts_B, enough & fits & ~values_n.isnan().any())
