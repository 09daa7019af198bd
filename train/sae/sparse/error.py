"""The squared errors of sparse reconstructions, with their gradients, in one pass where the backend has a kernel.

Letters: B tokens in a batch, E width of what is reconstructed, F latents, n entries, P prefixes of the latents,
X = B P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.sae.sparse.codes import Support


class SquaredError(NamedTuple):
    """What comes of the reconstructions by each prefix."""

    total: Float[Tensor, ""]
    """The sum over prefixes and tokens of ||e_bp||^2, differentiable."""
    last_B: Float[Tensor, " B"]
    """||e_b||^2 of the last prefix, detached."""
    error_BE: Float[Tensor, "B E"]
    """e of the last prefix, detached."""
    rows_dE: Float[Tensor, "d E"] | None
    """The rows of W_dec that were asked for."""


class _SquaredError(torch.autograd.Function):
    """sum_bp ||e_bp||^2 with e_p = f[:, :bound_p] W_dec[:bound_p] + base - target, what `SquaredError` names beside."""

    @staticmethod
    def forward(
        ctx: Any,
        values_n: Tensor,
        W_dec_FE: Tensor,
        base: Tensor,
        target_BE: Tensor,
        support: Support,
        bounds: Sequence[int],
        latents_d: Tensor | None,
        through_zeros: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        assert support.backend.fused is not None
        place_n, ends = support.in_bands(bounds)
        # The gradient's dots are products with the errors themselves, so they are at hand before the backward: the rows
        # of W_dec are read once.
        entries = (values_n, support.latents_n, ends)
        errors_XE, squares_B, last_B, dots_n = support.backend.fused.decode_error(
            *entries, W_dec_FE, base, target_BE, len(bounds), through_zeros=through_zeros
        )
        ctx.save_for_backward(values_n, errors_XE, dots_n, place_n, latents_d, W_dec_FE)
        ctx.support, ctx.base_rows, ctx.prefixes = support, base.dim(), len(bounds)
        error_BE = errors_XE if len(bounds) == 1 else errors_XE[len(bounds) - 1 :: len(bounds)].clone()
        ctx.mark_non_differentiable(error_BE, last_B)
        # What no term uses has no gradient: None then, and not a matrix of zeros.
        ctx.set_materialize_grads(False)
        rows_dE = None if latents_d is None else W_dec_FE.index_select(0, latents_d)
        return squares_B.sum(), last_B, error_BE, rows_dE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None, __: None, grad_dE: Tensor | None) -> tuple[Tensor | None, ...]:
        values_n, errors_XE, dots_n, place_n, latents_d, W_dec_FE = ctx.saved_tensors
        support: Support = ctx.support
        # d||e||^2 = 2 e de; de/df_bj = W_dec_j, de/dW_dec_j = f_bj, de/dbase = 1, of each prefix that holds j.
        scale = 2 * grad
        grad_values_n = grad_FE = grad_base = None
        if ctx.needs_input_grad[0]:
            grad_values_n = scale * dots_n
        if ctx.needs_input_grad[1]:
            # Where this is all of the gradient, the update need not read it to know its norm; W_dec's rows are unit.
            unit_FE = W_dec_FE if grad_dE is None else None
            grad_FE = support.latent_gradient(scale * values_n, errors_XE, unit_FE, place_n)[0]
            if grad_dE is not None:
                grad_FE.index_add_(0, latents_d, grad_dE)
        if ctx.needs_input_grad[2]:
            all_BE = errors_XE[:: ctx.prefixes]  # those of every prefix, which all hold the base
            grad_base = scale * (all_BE.sum(0) if ctx.base_rows == 1 else all_BE)
        return grad_values_n, grad_FE, grad_base, None, None, None, None, None


def squared_error(
    f_n: Float[Tensor, " n"],
    W_dec_FE: Float[Tensor, "F E"],
    base: Tensor,
    target_BE: Float[Tensor, "B E"],
    support: Support,
    *,
    bounds: Sequence[int] | None = None,
    latents_d: Int[Tensor, " d"] | None = None,
    through_zeros: bool = False,
) -> SquaredError:
    """Compute the squared errors of the reconstructions by each prefix, of a backend with fused kernels.

    e_p = f[:, :bound_p] W_dec[:bound_p] + base - target; `bounds` increase and end with F (None: F alone). `base` is
    one row [E] or one for each token. Entries with f = 0 take no gradient, but with `through_zeros`; the target takes
    none. The rows of W_dec that `latents_d` (each once) names come back too: their gradient is added to the one here,
    where another use of W_dec would make a second of its size.
    """
    assert not target_BE.requires_grad
    bounds = [support.shape[1]] if bounds is None else [*bounds]
    how = (support, bounds, latents_d, through_zeros)
    found = _SquaredError.apply(f_n, W_dec_FE, base, target_BE, *how)  # type: ignore[no-untyped-call]
    return SquaredError(*found)
