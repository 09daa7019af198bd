"""The squared error of a sparse reconstruction, with its gradients, in one pass where the backend has a kernel.

Letters: B tokens in a batch, E width of what is reconstructed, F latents, n entries.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.sae.sparse.codes import Support


class _SquaredError(torch.autograd.Function):
    """sum_b ||e_b||^2 with e = f W_dec + base - target, e itself, which passes no gradient, and rows of W_dec."""

    @staticmethod
    def forward(
        ctx: Any,
        values_n: Tensor,
        W_dec_FE: Tensor,
        base: Tensor,
        target_BE: Tensor,
        support: Support,
        latents_d: Tensor | None,
        through_zeros: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        assert support.backend.fused is not None
        # The gradient's dots are products with the error itself, so they are at hand before the backward: the rows of
        # W_dec are read once.
        error_BE, squares_B, dots_n = support.backend.fused.decode_error(
            values_n, support.latents_n, support.row_ends, W_dec_FE, base, target_BE, through_zeros=through_zeros
        )
        ctx.save_for_backward(values_n, error_BE, dots_n, latents_d, W_dec_FE)
        ctx.support, ctx.base_rows = support, base.dim()
        ctx.mark_non_differentiable(error_BE)
        # What no term uses has no gradient: None then, and not a matrix of zeros.
        ctx.set_materialize_grads(False)
        return squares_B.sum(), error_BE, None if latents_d is None else W_dec_FE.index_select(0, latents_d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None, grad_dE: Tensor | None) -> tuple[Tensor | None, ...]:
        values_n, error_BE, dots_n, latents_d, W_dec_FE = ctx.saved_tensors
        support: Support = ctx.support
        # d||e||^2 = 2 e de; de/df_bj = W_dec_j, de/dW_dec_j = f_bj, de/dbase = 1.
        scale = 2 * grad
        grad_values_n = grad_FE = grad_base = None
        if ctx.needs_input_grad[0]:
            grad_values_n = scale * dots_n
        if ctx.needs_input_grad[1]:
            # Where this is all of the gradient, the update need not read it to know its norm; W_dec's rows are unit.
            unit_FE = W_dec_FE if grad_dE is None else None
            grad_FE = support.latent_gradient(scale * values_n, error_BE, unit_FE)[0]
            if grad_dE is not None:
                grad_FE.index_add_(0, latents_d, grad_dE)
        if ctx.needs_input_grad[2]:
            grad_base = scale * (error_BE.sum(0) if ctx.base_rows == 1 else error_BE)
        return grad_values_n, grad_FE, grad_base, None, None, None, None


def squared_error(
    f_n: Float[Tensor, " n"],
    W_dec_FE: Float[Tensor, "F E"],
    base: Tensor,
    target_BE: Float[Tensor, "B E"],
    support: Support,
    latents_d: Int[Tensor, " d"] | None = None,
    *,
    through_zeros: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B E"], Float[Tensor, "d E"] | None]:
    """Compute sum_b ||e_b||^2 and e = f W_dec + base - target, detached, of a backend with fused kernels.

    `base` is one row [E] or one for each token. Entries with f = 0 take no gradient, but with `through_zeros`; the
    target takes none. The rows of W_dec that `latents_d` (each once) names come back too: their gradient is added to
    the one here, where another use of W_dec would make a second of its size.
    """
    assert not target_BE.requires_grad
    parts = _SquaredError.apply(f_n, W_dec_FE, base, target_BE, support, latents_d, through_zeros)  # type: ignore[no-untyped-call]
    total, error_BE, rows_dE = parts
    return total, error_BE, rows_dE
