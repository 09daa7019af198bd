"""Sparse activations f [B, F] as a value: which entries, in both orders, and the products that touch only those.

Letters: B tokens in a batch, D model width, F latents, n entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as functional
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

with warnings.catch_warnings():  # torch says once a process that its CSR tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))


def _ends(index_n: Tensor, count: int) -> Tensor:
    """Where each of `count` groups ends in a sorted index, a 0 before the first: [count + 1]."""
    ends = torch.zeros(count + 1, dtype=torch.int64, device=index_n.device)
    torch.cumsum(torch.bincount(index_n, minlength=count), 0, out=ends[1:])
    return ends


def _weighted_sums(weight_n: Tensor, index_n: Tensor, ends: Tensor, of_XD: Tensor) -> Tensor:
    """For each group the sum of weight * of[index] over its entries, [groups, D]."""
    if not len(index_n):
        return of_XD.new_zeros(len(ends) - 1, of_XD.shape[1])
    return functional.embedding_bag(
        index_n, of_XD, ends, mode="sum", per_sample_weights=weight_n, include_last_offset=True
    )


class Support:
    """The places of n entries of a [B, F] matrix, by token and by latent. `rows`, `latents` ascend as pairs."""

    def __init__(self, rows_n: Int[Tensor, " n"], latents_n: Int[Tensor, " n"], shape: tuple[int, int]) -> None:
        self.rows_n, self.latents_n, self.shape = rows_n, latents_n, shape

    def __len__(self) -> int:
        return len(self.rows_n)

    @cached_property
    def row_ends(self) -> Int[Tensor, " rows"]:
        return _ends(self.rows_n, self.shape[0])

    @cached_property
    def latent_ends(self) -> Int[Tensor, " latents"]:
        return _ends(self.latents_n, self.shape[1])

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The entries latent by latent: their numbers in the order by token, and their rows."""
        narrow = torch.int16 if self.shape[1] <= 1 << 15 else torch.int32  # sorts in half the time
        order_n = torch.sort(self.latents_n.to(narrow), stable=True).indices
        return order_n, self.rows_n[order_n]

    def row_sums(self, values_n: Float[Tensor, " n"], of_FD: Float[Tensor, "F D"]) -> Float[Tensor, "B D"]:
        """f @ of, f the matrix with these values at these places."""
        return _weighted_sums(values_n, self.latents_n, self.row_ends, of_FD)

    def latent_sums(self, values_n: Float[Tensor, " n"], of_BD: Float[Tensor, "B D"]) -> Float[Tensor, "F D"]:
        """f^T @ of."""
        order_n, rows_n = self.by_latent
        return _weighted_sums(values_n[order_n], rows_n, self.latent_ends, of_BD)

    def latent_totals(self, values_n: Float[Tensor, " n"]) -> Float[Tensor, " F"]:
        """The sum of each latent's values."""
        return values_n.new_zeros(self.shape[1]).index_add_(0, self.latents_n, values_n)

    def products(self, left_BD: Float[Tensor, "B D"], right_FD: Float[Tensor, "F D"]) -> Float[Tensor, " n"]:
        """left @ right^T at these places only."""
        if not len(self):
            return left_BD.new_zeros(0)
        place = torch.sparse_csr_tensor(
            self.row_ends, self.latents_n, left_BD.new_zeros(len(self)), self.shape, check_invariants=False
        )
        product: Tensor = torch.sparse.sampled_addmm(place, left_BD, right_FD.t(), beta=0.0).values()
        return product

    def dense(self, values_n: Float[Tensor, " n"]) -> Float[Tensor, "B F"]:
        """The matrix itself."""
        return values_n.new_zeros(self.shape).index_put((self.rows_n, self.latents_n), values_n)

    def fired(self, values_n: Float[Tensor, " n"]) -> Bool[Tensor, " F"]:
        """Latents with a value above zero on any token."""
        fired_F = torch.zeros(self.shape[1], dtype=torch.bool, device=values_n.device)
        return fired_F.index_fill_(0, self.latents_n[values_n > 0], True)

    def parts(self, bounds: Sequence[int]) -> list[tuple[Int[Tensor, " m"], Support]]:
        """The entries whose latent lies in [0, bounds[0]), [bounds[0], bounds[1]) ...: their numbers, and a support.

        A part's latents count from where it begins. `bounds` increase and end with F.
        """
        if list(bounds) == [self.shape[1]]:
            return [(torch.arange(len(self), device=self.rows_n.device), self)]
        found = []
        for start, end in pairwise([0, *bounds]):
            index_m = ((self.latents_n >= start) & (self.latents_n < end)).nonzero().squeeze(1)
            part = Support(self.rows_n[index_m], self.latents_n[index_m] - start, (self.shape[0], end - start))
            found.append((index_m, part))
        return found


class Decode(torch.autograd.Function):
    """x_hat_P_BD [P, B, D]: x_hat_p = sum over parts up to p of f[:, part] W_dec[part], from the entries alone."""

    @staticmethod
    def forward(ctx: Any, values_n: Tensor, W_dec_FD: Tensor, support: Support, bounds: Sequence[int]) -> Tensor:
        ctx.save_for_backward(values_n, W_dec_FD)
        ctx.support, ctx.starts, ctx.parts = support, [0, *bounds[:-1]], support.parts(bounds)
        x_hat_PBD = W_dec_FD.new_empty(len(ctx.parts), support.shape[0], W_dec_FD.shape[1])
        for p, (start, (index_m, part)) in enumerate(zip(ctx.starts, ctx.parts, strict=True)):
            values_m = values_n if part is support else values_n[index_m]
            x_hat_PBD[p] = part.row_sums(values_m, W_dec_FD[start : start + part.shape[1]])
            if p:
                x_hat_PBD[p] += x_hat_PBD[p - 1]
        return x_hat_PBD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PBD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values_n, W_dec_FD = ctx.saved_tensors
        grad_values_n = torch.empty_like(values_n) if ctx.needs_input_grad[0] else None
        whole = len(ctx.parts) == 1
        grad_FD = torch.empty_like(W_dec_FD) if ctx.needs_input_grad[1] and not whole else None
        for p, (start, (index_m, part)) in enumerate(zip(ctx.starts, ctx.parts, strict=True)):
            grad_BD = grad_PBD[0] if whole else grad_PBD[p:].sum(0)  # a part is in its own x_hat and all after it
            rows_FD = W_dec_FD[start : start + part.shape[1]]
            if grad_values_n is not None:
                products_m = part.products(grad_BD, rows_FD)
                grad_values_n = products_m if whole else grad_values_n.index_copy_(0, index_m, products_m)
            if ctx.needs_input_grad[1]:
                sums = part.latent_sums(values_n if whole else values_n[index_m], grad_BD)
                if grad_FD is None:
                    grad_FD = sums
                else:
                    grad_FD[start : start + part.shape[1]] = sums
        return grad_values_n, grad_FD, None, None
