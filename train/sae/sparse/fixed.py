"""The sparse step on a GPU: every size is known beforehand, so that the host never waits for the device.

A selection holds exactly as many entries as were asked for; what is not positive among them stands with value 0, takes
no gradient and does not count as fired. Exact, ties to the lowest index. Products are Triton's.
Letters: B tokens in a batch, D model width, F latents, n entries, P prefixes, R lines of M values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.sae.sparse.codes import Support
from train.sae.sparse.select import Entries, TopOfBatch, TopPerToken, joined

_GROUP = 32  # neighbours of which only the largest takes part in the first choice


def wanted(x: Tensor) -> bool:
    """Whether what is made from x takes this path: on a GPU, or where Triton's interpreter stands in for one."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def largest(values_RM: Float[Tensor, "R M"], count: int) -> Int[Tensor, " n"]:
    """The places, in the flattened values and ascending, of the `count` largest of each line; ties to the lowest.

    No more than `count` groups can hold them: those of the largest maxima, ties to the lowest. So two small choices
    are made, the first among the groups' maxima, and the values are read once.
    """
    lines, width = values_RM.shape
    group = min(_GROUP, width & -width)
    if count >= width // group:
        return _largest(values_RM, count)
    near = _largest(values_RM.view(lines, -1, group).amax(2), count)
    place = (near[:, None] * group + torch.arange(group, device=near.device)).view(-1)
    values = values_RM.reshape(-1).index_select(0, place).view(lines, -1)
    return place.index_select(0, _largest(values, count))


def _largest(values_RM: Tensor, count: int) -> Tensor:
    smallest = values_RM.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    larger, equal = values_RM > smallest, values_RM == smallest
    left = count - larger.sum(1, keepdim=True)
    kept = larger | (equal & (equal.cumsum(1, dtype=torch.int32) <= left))
    # Where NaN leaves fewer, the rest is place 0: the loss tells of the NaN.
    return torch.nonzero_static(kept.view(-1), size=len(values_RM) * count, fill_value=0).squeeze(1)


class FixedSupport(Support):
    """A support whose making and use ask the device nothing; values may be 0 where nothing was to be kept."""

    @cached_property
    def row_ends(self) -> Int[Tensor, " rows"]:
        return _ends(self.rows_n, self.shape[0])

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        found = torch.sort(self.latents_n.to(torch.int32), stable=True)
        return found.values, found.indices

    @cached_property
    def latent_ends(self) -> Int[Tensor, " latents"]:
        return _ends(self._sorted[0], self.shape[1])

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        order_n = self._sorted[1]
        return order_n, self.rows_n.index_select(0, order_n)

    def row_sums(self, values_n: Float[Tensor, " n"], of_FD: Float[Tensor, "F D"]) -> Float[Tensor, "B D"]:
        from train.sae.sparse import kernels

        return kernels.gather_sums(values_n, self.latents_n, self.row_ends, of_FD)

    def latent_sums(self, values_n: Float[Tensor, " n"], of_BD: Float[Tensor, "B D"]) -> Float[Tensor, "F D"]:
        from train.sae.sparse import kernels

        order_n, rows_n = self.by_latent
        return kernels.gather_sums(values_n.index_select(0, order_n), rows_n, self.latent_ends, of_BD)

    def fired(self, values_n: Float[Tensor, " n"]) -> Bool[Tensor, " F"]:
        counts_F = torch.zeros(self.shape[1], dtype=torch.int32, device=values_n.device)
        return counts_F.index_add_(0, self.latents_n, (values_n > 0).int()) > 0


def _ends(index_n: Tensor, count: int) -> Tensor:
    """Where each of `count` groups begins in a sorted index, and the last ends: [count + 1]."""
    return torch.searchsorted(index_n, torch.arange(count + 1, dtype=index_n.dtype, device=index_n.device))


class FixedDecode(torch.autograd.Function):
    """`codes.Decode` of a FixedSupport: an entry belongs to its token and to the first prefix that holds its latent."""

    @staticmethod
    def forward(ctx: Any, values_n: Tensor, W_dec_FD: Tensor, support: FixedSupport, bounds: Sequence[int]) -> Tensor:
        from train.sae.sparse import kernels

        rows, prefixes = support.shape[0], len(bounds)
        part_n = torch.zeros_like(support.latents_n)
        for bound in bounds[:-1]:
            part_n += support.latents_n >= bound
        ends = support.row_ends if prefixes == 1 else _ends(support.rows_n * prefixes + part_n, rows * prefixes)
        parts_BPD = kernels.gather_sums(values_n, support.latents_n, ends, W_dec_FD).view(rows, prefixes, -1)
        x_hat_PBD = parts_BPD.transpose(0, 1).contiguous()
        for p in range(1, prefixes):  # no cumsum: torch refuses it on a GPU where it is asked to be deterministic
            x_hat_PBD[p] += x_hat_PBD[p - 1]
        ctx.save_for_backward(values_n, W_dec_FD, part_n * rows + support.rows_n)
        ctx.support = support
        return x_hat_PBD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PBD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        from train.sae.sparse import kernels

        values_n, W_dec_FD, place_n = ctx.saved_tensors
        support = ctx.support
        prefixes = len(grad_PBD)
        grad_PBD = grad_PBD if prefixes == 1 else grad_PBD.clone()
        for p in reversed(range(prefixes - 1)):  # a part is in its own x_hat and all after it
            grad_PBD[p] += grad_PBD[p + 1]
        grad_XD = grad_PBD.reshape(-1, grad_PBD.shape[2])
        grad_values_n = grad_FD = None
        if ctx.needs_input_grad[0]:
            grad_values_n = kernels.entry_dots(place_n, support.latents_n, grad_XD, W_dec_FD)
        if ctx.needs_input_grad[1]:
            order_n, _ = support.by_latent
            weight_n, place_n = values_n.index_select(0, order_n), place_n.index_select(0, order_n)
            grad_FD = kernels.gather_sums(weight_n, place_n, support.latent_ends, grad_XD)
        return grad_values_n, grad_FD, None, None


def _places(selector: TopOfBatch | TopPerToken, values: Tensor, rows: int) -> Tensor:
    """Where the selector's entries stand among values, of so many rows, in order."""
    if isinstance(selector, TopOfBatch):
        return largest(values.view(1, -1), min(selector.count, values.numel()))
    lines_RM = values.view(rows, -1)
    return largest(lines_RM, min(selector.k, lines_RM.shape[1]))


def choose(
    selector: TopOfBatch | TopPerToken,
    blocks: Sequence[int],
    z_of: Callable[[int, int], Float[Tensor, "B c"]],
    width: int,
) -> Entries:
    """What a selector keeps of z, of which `z_of` gives the latents from one of `blocks` to the next."""
    held: Entries | None = None
    rows = 0
    for first, last in zip(blocks, [*blocks[1:], width], strict=True):
        z_Bc = z_of(first, last)
        rows = len(z_Bc)
        place_n = _places(selector, z_Bc, rows)
        rows_n = place_n.div(last - first, rounding_mode="floor")
        new = Entries(rows_n, place_n - rows_n * (last - first) + first, z_Bc.reshape(-1).index_select(0, place_n))
        if held is None:
            held = new
        else:
            both = joined([held, new])
            place_n = _places(selector, both.values_n, rows)
            held = Entries(*(part.index_select(0, place_n) for part in both))
    assert held is not None
    return held


def top_of_rows(values_n: Float[Tensor, " n"], k: int, rows: int) -> Int[Tensor, " m"]:
    """Which entries, equally many of each row, are among the k largest of their row."""
    return largest(values_n.view(rows, -1), k)
