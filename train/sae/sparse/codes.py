"""Sparse activations f [B, F] as a value: which entries, in both orders, and the products that touch only those.

Letters: B tokens in a batch, D model width, F latents, n entries, P prefixes of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.sae.sparse.backend import Backend, backend_for
from train.sae.sparse.groups import Groups
from train.sae.sparse.row_norms import leave_norms
from train.sae.sparse.rules import Entries


class Support:
    """The places of n entries of a [B, F] matrix, by token and by latent. `rows`, `latents` ascend as pairs.

    With a backend of fixed sizes some entries may have the value 0, where nothing was to be kept.
    """

    def __init__(
        self,
        rows_n: Int[Tensor, " n"],
        latents_n: Int[Tensor, " n"],
        shape: tuple[int, int],
        backend: Backend | None = None,
    ) -> None:
        self.rows_n, self.latents_n, self.shape = rows_n, latents_n, shape
        self.backend = backend_for(rows_n) if backend is None else backend

    def __len__(self) -> int:
        return len(self.rows_n)

    @cached_property
    def row_ends(self) -> Int[Tensor, " ends"]:
        """Return where each token's entries begin, and the last one's end."""
        return self.backend.ends(self.rows_n, self.shape[0])

    @cached_property
    def by_latent(self) -> Groups:
        """Order the entries latent by latent."""
        return self.backend.order(self.latents_n, self.shape[1])

    def in_bands(self, bounds: Sequence[int]) -> tuple[Int[Tensor, " n"], Int[Tensor, " ends"]]:
        """Give each entry the number of its token and band, and find where those of each begin.

        A band is what a prefix of the latents, up to one of the `bounds`, has more than the one before. Token and band
        together make one ascending index, so all prefixes are decoded by a single call.
        """
        if len(bounds) == 1:
            return self.rows_n, self.row_ends
        part_n = torch.zeros_like(self.latents_n)
        for bound in bounds[:-1]:
            part_n += self.latents_n >= bound
        place_n = self.rows_n * len(bounds) + part_n
        return place_n, self.backend.ends(place_n, self.shape[0] * len(bounds))

    def row_sums(self, values_n: Float[Tensor, " n"], of_FD: Float[Tensor, "F D"]) -> Float[Tensor, "B D"]:
        """Compute f @ of, f the matrix with these values at these places."""
        return self.backend.gather_sums(values_n, self.latents_n, self.row_ends, of_FD)

    def latent_sums(self, values_n: Float[Tensor, " n"], of_BD: Float[Tensor, "B D"]) -> Float[Tensor, "F D"]:
        """Compute f^T @ of."""
        return self.latent_sums_from(values_n, self.rows_n, of_BD)

    def latent_sums_from(
        self, values_n: Float[Tensor, " n"], index_n: Int[Tensor, " n"], of_XD: Float[Tensor, "X D"]
    ) -> Float[Tensor, "F D"]:
        """Sum each latent's values times the rows of a table that `index_n` names for its entries."""
        return self.backend.group_sums(values_n, index_n, self.by_latent, of_XD)

    def latent_sums_and_totals(
        self, values_n: Float[Tensor, " n"], of_BD: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "F D"], Float[Tensor, " F"]]:
        """Compute f^T @ of, and the sum of each latent's values."""
        return self.backend.group_sums_and_totals(values_n, self.rows_n, self.by_latent, of_BD)

    def latent_gradient(
        self,
        values_n: Float[Tensor, " n"],
        of_XD: Float[Tensor, "X D"],
        unit_FD: Float[Tensor, "F D"] | None = None,
        index_n: Int[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, "F D"], Float[Tensor, " F"]]:
        """Compute the same as a gradient; where the kernel knows the norms of its rows it leaves them for the update.

        `unit_FD` are the weights that it is the gradient of, where their rows are unit; `index_n` the rows of `of_XD`
        that the entries read, by default their tokens'.
        """
        index_n = self.rows_n if index_n is None else index_n
        if self.backend.fused is None:
            return self.backend.group_sums_and_totals(values_n, index_n, self.by_latent, of_XD)
        grad_FD, totals_F, norms = self.backend.fused.gradient_rows(values_n, index_n, self.by_latent, of_XD, unit_FD)
        leave_norms(grad_FD, norms)
        return grad_FD, totals_F

    def totals(self, values_n: Float[Tensor, " n"]) -> Float[Tensor, " F"]:
        """Sum each latent's values."""
        return self.backend.totals(values_n, self.by_latent)

    def products(self, left_BD: Float[Tensor, "B D"], right_FD: Float[Tensor, "F D"]) -> Float[Tensor, " n"]:
        """Compute left @ right^T at these places only."""
        return self.backend.dots(self.rows_n, self.latents_n, left_BD, right_FD)

    def dense(self, values_n: Float[Tensor, " n"]) -> Float[Tensor, "B F"]:
        """Give the matrix itself."""
        return values_n.new_zeros(self.shape).index_put((self.rows_n, self.latents_n), values_n)

    def fired(self, values_n: Float[Tensor, " n"]) -> Bool[Tensor, " F"]:
        """Find the latents with a value above zero on any token."""
        return self.backend.fired(values_n, self.latents_n, self.shape[1])


class _Totals(torch.autograd.Function):
    """Each latent's sum of values, and the gradient beside each entry.

    torch's own forms of it and of `_Beside` add on a GPU in whatever order they come to it.
    """

    @staticmethod
    def forward(ctx: Any, values_n: Tensor, support: Support) -> Tensor:
        ctx.support = support
        return support.totals(values_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_F: Tensor) -> tuple[Tensor, None]:
        return grad_F.index_select(0, ctx.support.latents_n), None


class _Beside(torch.autograd.Function):
    """A vector over latents beside each entry; its gradient is each latent's sum."""

    @staticmethod
    def forward(ctx: Any, of_F: Tensor, support: Support) -> Tensor:
        ctx.support = support
        return of_F.index_select(0, support.latents_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor, None]:
        return ctx.support.totals(grad_n), None


class Decode(torch.autograd.Function):
    """x_hat_P_BD [P, B, D]: x_hat_p = f[:, :bound_p] W_dec[:bound_p], from the entries alone.

    An entry belongs to its token and to the first prefix that holds its latent; each x_hat adds its own entries to the
    one before.
    """

    @staticmethod
    def forward(ctx: Any, values_n: Tensor, W_dec_FD: Tensor, support: Support, bounds: Sequence[int]) -> Tensor:
        rows, prefixes = support.shape[0], len(bounds)
        place_n, ends = support.in_bands(bounds)
        parts_BPD = support.backend.gather_sums(values_n, support.latents_n, ends, W_dec_FD).view(rows, prefixes, -1)
        x_hat_PBD = parts_BPD.transpose(0, 1).contiguous()
        for p in range(1, prefixes):  # no cumsum: torch refuses it on a GPU where it is asked to be deterministic
            x_hat_PBD[p] += x_hat_PBD[p - 1]
        # The row of the stacked gradients [P * B, D] that each entry reads in the backward.
        if prefixes > 1:
            place_n = (place_n - support.rows_n * prefixes) * rows + support.rows_n
        ctx.save_for_backward(values_n, W_dec_FD, place_n)
        ctx.support = support
        return x_hat_PBD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PBD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values_n, W_dec_FD, place_n = ctx.saved_tensors
        support: Support = ctx.support
        prefixes = len(grad_PBD)
        if prefixes > 1:  # a part is in its own x_hat and in all after it
            grad_PBD = torch.stack([grad_PBD[p:].sum(0) for p in range(prefixes)])
        grad_XD = grad_PBD.reshape(-1, grad_PBD.shape[2])
        grad_values_n = grad_FD = None
        # d/df_bj = grad_b . W_dec_j, at the entries alone: f's zeros take no gradient, and the dense [B, F] is never
        # made.
        if ctx.needs_input_grad[0]:
            grad_values_n = support.backend.dots(place_n, support.latents_n, grad_XD, W_dec_FD)
        # d/dW_dec_j = sum over the tokens that fired j of f_bj grad_b: the same entries in the order by latent.
        if ctx.needs_input_grad[1]:
            grad_FD = support.latent_sums_from(values_n, place_n, grad_XD)
        return grad_values_n, grad_FD, None, None


class Codes:
    """The z that matter to a step: those of the entries in `support`, [n], or all, [B, F], where `support` is None.

    What a variant writes in terms of `values`, `at`, `decode` and `fired` holds in both forms.
    """

    def __init__(self, values: Tensor, support: Support | None, shape: tuple[int, int]) -> None:
        self.values, self.support, self.shape = values, support, shape

    def of(self, f: Tensor) -> Codes:
        """Give the same places with f for z, detached."""
        return Codes(f.detach(), self.support, self.shape)

    def at(self, of_F: Shaped[Tensor, " F"]) -> Tensor:
        """Give a vector over latents, for use beside z."""
        if self.support is None:
            return of_F
        beside_n: Tensor = _Beside.apply(of_F, self.support)  # type: ignore[no-untyped-call]
        return beside_n

    def decode(
        self, f: Tensor, W_dec_FD: Float[Tensor, "F D"], bounds: Sequence[int] | None = None
    ) -> Float[Tensor, "P B D"]:
        """Compute f[:, :bound] W_dec[:bound] for each of the `bounds` (increasing, the last F; None: F alone)."""
        bounds = [self.shape[1]] if bounds is None else list(bounds)
        if self.support is not None:
            x_hat_PBD: Tensor = Decode.apply(f, W_dec_FD, self.support, bounds)  # type: ignore[no-untyped-call]
            return x_hat_PBD
        if len(bounds) == 1:  # no slice of W_dec: its backward would make and add a second gradient of that size
            return (f @ W_dec_FD)[None]
        x_hats = [f[:, : bounds[0]] @ W_dec_FD[: bounds[0]]]
        for start, end in pairwise(bounds):  # no cumsum: torch refuses it on a GPU where it is to be deterministic
            x_hats.append(x_hats[-1] + f[:, start:end] @ W_dec_FD[start:end])
        return torch.stack(x_hats)

    def fired(self, f: Tensor) -> Bool[Tensor, " F"]:
        """Find the latents with f above zero on any token."""
        return f.amax(0) > 0 if self.support is None else self.support.fired(f)

    def top_of_rows(self, k: int) -> Codes:
        """Keep the k largest of each token, of entries."""
        assert self.support is not None
        entries = Entries(self.support.rows_n, self.support.latents_n, self.values.detach())
        return self._at_index(self.support, self.support.backend.top_of_rows(entries, k, self.shape[0]))

    def kept(self, kept: Bool[Tensor, ...]) -> Codes:
        """Keep the values that are marked; others become 0 where sizes are fixed, and are no entries elsewhere."""
        if self.support is None or self.support.backend.fixed_sizes:
            return Codes(torch.where(kept, self.values, 0.0), self.support, self.shape)
        return self._at_index(self.support, kept.nonzero().squeeze(1))

    def _at_index(self, support: Support, index_m: Int[Tensor, " m"]) -> Codes:
        """Keep the entries of these numbers, in order."""
        chosen = Support(support.rows_n[index_m], support.latents_n[index_m], self.shape, support.backend)
        return Codes(self.values.index_select(0, index_m), chosen, self.shape)

    def totals(self, f: Tensor) -> Float[Tensor, " F"]:
        """Sum f over tokens."""
        if self.support is None:
            return f.sum(0)
        totals_F: Tensor = _Totals.apply(f, self.support)  # type: ignore[no-untyped-call]
        return totals_F

    def dense(self, f: Tensor) -> Float[Tensor, "B F"]:
        """Give f as a matrix."""
        return f if self.support is None else self.support.dense(f)
