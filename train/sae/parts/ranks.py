"""The processes that train one SAE, and the largest of values that are spread over them.

Letters: n entries of this process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.sae.parts.groups import ALONE, RankGroup
from train.sae.parts.split import WHOLE, LatentSplit

_DIGIT = 11  # bits a round: 2,048 counts, 16 KB, for every process
_BINS = 1 << _DIGIT


@dataclass(frozen=True, eq=False)
class Mesh:
    """The processes that train one SAE: `data` have other rows of the batch each, `latents` other latents each."""

    data: RankGroup = ALONE
    """Those that hold the same latents."""
    latents: LatentSplit = WHOLE
    """Those that read the same rows."""

    @property
    def size(self) -> int:
        """Return how many they are."""
        return self.data.size * self.latents.size

    def sum_(self, x: Tensor) -> Tensor:
        """Add up x over all of them, in place; also returns it."""
        return self.data.sum_(self.latents.sum_(x))

    def max_(self, x: Tensor) -> Tensor:
        """Take the largest of x over all of them, in place; also returns it."""
        return self.data.max_(self.latents.max_(x))


ONE = Mesh()
"""One process that has all rows and all latents."""


# Floats in order as unsigned integers of the same bits


def _to_keys(values_n: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Give integers that are, read without a sign, in the order of the values."""
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[values_n.dtype]
    bits_n = values_n.contiguous().view(integer)
    # Negative floats descend as their bits ascend; the sign's bit puts the others above them.
    return torch.where(bits_n < 0, ~bits_n, bits_n ^ torch.iinfo(integer).min)


def _from_key(key: Int[Tensor, ""], dtype: torch.dtype) -> Float[Tensor, ""]:
    """Give the value of a key."""
    return torch.where(key < 0, key ^ torch.iinfo(key.dtype).min, ~key).view(dtype)


def _descend(
    keys_n: Int[Tensor, " n"], bits: int, among_n: Bool[Tensor, " n"], left: Int[Tensor, ""], mesh: Mesh
) -> tuple[Int[Tensor, ""], Bool[Tensor, " n"], Int[Tensor, ""]]:
    """Find the `left`-th largest of the keys marked by `among_n` over the mesh.

    Gives it, which keys here are equal to it, and how many of its equals belong to the `left` largest. A few rounds of
    summed histograms, 11 bits each from the highest, spell out its bits; nothing waits for the device.
    """
    alike_n = among_n  # keys whose higher bits are those of the one that is looked for
    found = keys_n.new_zeros(())
    for shift in range((bits - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
        mask = (1 << min(_DIGIT, bits - shift)) - 1  # the highest digit is short, and a sign fills what is above it
        digit_n = keys_n.bitwise_right_shift(shift).bitwise_and(mask)
        counts = torch.zeros(_BINS, dtype=torch.int64, device=keys_n.device)
        counts.index_add_(0, digit_n.long(), alike_n.long())
        mesh.sum_(counts)
        reached = counts.flip(0).cumsum(0).flip(0)  # keys with this digit or a higher one
        digit = (reached >= left).sum() - 1
        left = left - (reached[digit] - counts[digit])
        alike_n = alike_n & (digit_n == digit)
        found = found | digit.to(keys_n.dtype).bitwise_left_shift(shift)
    return found, alike_n, left


@torch.no_grad()
def kth_largest(values_n: Float[Tensor, " n"], k: int, mesh: Mesh) -> Float[Tensor, ""]:
    """Find the k-th largest of all values over the mesh, which must have so many; the same on every process."""
    keys_n = _to_keys(values_n)
    everything_n = torch.ones_like(keys_n, dtype=torch.bool)
    bits = torch.iinfo(keys_n.dtype).bits
    key, _, _ = _descend(keys_n, bits, everything_n, torch.tensor(k, device=keys_n.device), mesh)
    return _from_key(key, values_n.dtype)


@torch.no_grad()
def largest_over_ranks(
    values_n: Float[Tensor, " n"], place_n: Int[Tensor, " n"], places: int, count: int, mesh: Mesh
) -> tuple[Bool[Tensor, " n"], Float[Tensor, ""]]:
    """Mark which values here are among the `count` largest above zero over the mesh, and find the smallest of those.

    `place_n` numbers the entries over the whole mesh, each from 0 to `places` - 1 and none twice: ties go to the lowest
    place, as in one process that has all of them in that order. `values_n` must hold this process's share of the
    choice, such as its own `count` largest. The smallest is 0 where fewer than `count` are positive, and is the same
    everywhere. Exact. What is not a number counts as kept, so that it reaches the loss.
    """
    keys_n, positive_n = _to_keys(values_n), values_n > 0
    total = mesh.sum_(positive_n.sum())
    bits = torch.iinfo(keys_n.dtype).bits
    key, ties_n, left = _descend(keys_n, bits, positive_n, total.clamp(max=count), mesh)
    smallest = _from_key(key, values_n.dtype)
    # Of the ties at the smallest `left` are taken, from the lowest place on: the `left` largest of places in reverse.
    behind_n = places - 1 - place_n
    last, _, _ = _descend(behind_n, max(1, (places - 1).bit_length()), ties_n, left, mesh)
    kept_n = (positive_n & (values_n > smallest)) | (ties_n & (behind_n >= last)) | values_n.isnan()
    return kept_n, torch.where(total >= count, smallest, torch.zeros_like(smallest))
