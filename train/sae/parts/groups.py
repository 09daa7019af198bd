"""Processes that work together, and sums over them that gradients pass through.

Every process takes part in every call, whatever it holds: a call is a message that the others wait for.
Letters: R processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Reduce(torch.autograd.Function):
    """The sum over a group, times a factor, forward; the gradient as it comes, backward.

    Right where every process of the group goes on with the sum alike: each has the whole gradient of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup, factor: float) -> Tensor:
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
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_(grad.clone(memory_format=torch.contiguous_format)), None


@dataclass(frozen=True, eq=False)
class RankGroup:
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
        parts = x.new_empty(self.size, *x.shape)
        dist.all_gather([*parts.unbind()], x.contiguous(), group=self.handle)
        return parts

    def broadcast_(self, x: Tensor) -> None:
        """Give every process the first one's x, in place."""
        if self.size > 1:
            dist.broadcast(x, group=self.handle, group_src=0)


ALONE = RankGroup()
