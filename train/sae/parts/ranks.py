"""What several processes compute together: sums over them, and the largest of values that are spread over them.

Every process takes part in every call, whatever it holds: a call is a message that the others wait for.
Letters: n entries of this process, R processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

_DIGIT = 11  # bits a round: 2,048 counts, 16 KB, for every process
_BINS = 1 << _DIGIT


class _Reduce(torch.autograd.Function):
    """The sum over a group, times a factor, forward; the gradient as it comes, backward.

    Right where every process of the group goes on with the sum alike: each has the whole gradient of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, factor: float) -> Tensor:
        return group.sum_(x.clone(memory_format=torch.contiguous_format)) * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _Share(torch.autograd.Function):
    """The value as it is, forward; the gradient's sum over a group, backward.

    Right where every process of the group has the same value and goes on with a part of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_(grad.clone(memory_format=torch.contiguous_format)), None


@dataclass(frozen=True, eq=False)
class Group:
    """Processes that hold parts of one thing, in their order; alone, nothing is sent."""

    size: int = 1
    """How many they are."""
    rank: int = 0
    """The place of this one among them."""
    handle: dist.ProcessGroup | None = None
    """Their process group; None for torch's default group."""

    def sum_(self, x: Tensor) -> Tensor:
        """Add up x over the group, in place; also returns it."""
        if self.size > 1:
            dist.all_reduce(x, group=self.handle)
        return x

    def max_(self, x: Tensor) -> Tensor:
        """Take the largest of x over the group, in place; also returns it."""
        if self.size > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.handle)
        return x

    def total(self, x: Tensor) -> Tensor:
        """Give the sum of x over the group; its gradient goes back as it comes."""
        if self.size == 1:
            return x
        found: Tensor = _Reduce.apply(x, self, 1.0)  # type: ignore[no-untyped-call]
        return found

    def mean(self, x: Tensor) -> Tensor:
        """Give the mean of x over the group; its gradient goes back as it comes, as gradients are averaged later."""
        if self.size == 1:
            return x
        found: Tensor = _Reduce.apply(x, self, 1 / self.size)  # type: ignore[no-untyped-call]
        return found

    def shared(self, x: Tensor) -> Tensor:
        """Give x, the same everywhere, of which each process uses a part: gradients are added up on the way back."""
        if self.size == 1:
            return x
        found: Tensor = _Share.apply(x, self)  # type: ignore[no-untyped-call]
        return found

    def gather(self, x: Tensor) -> Tensor:
        """Stack every process's x, all of one shape: [R, ...]."""
        if self.size == 1:
            return x[None]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.handle)
        return torch.stack(parts)

    def broadcast_(self, x: Tensor) -> None:
        """Give every process the first one's x, in place."""
        if self.size > 1:
            dist.broadcast(x, group=self.handle, group_src=0)


ALONE = Group()


@dataclass(frozen=True, eq=False)
class Mesh:
    """The processes that train one SAE: `data` have other rows of the batch each, `latents` other latents each."""

    data: Group = ALONE
    """Those that hold the same latents."""
    latents: Group = ALONE
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
