"""The encoder's product where few of its entries matter: z in blocks of latents, of which rules keep some.

Letters: B tokens in a batch, D model width, F latents, n entries, d chosen latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.sae.sparse.backend import backend_for
from train.sae.sparse.codes import Codes, Support
from train.sae.sparse.product import Product
from train.sae.sparse.rules import Entries, Selection, TopOfBatch, TopPerToken


class _Encode(torch.autograd.Function):
    """z = (x' - b_dec) W_enc + bias at places chosen beforehand; its gradients touch only those.

    `values`, `supports` and `latents` have one item a selection.
    """

    @staticmethod
    def forward(
        ctx: Any,
        xn_BD: Tensor,
        W_enc_FD: Tensor,
        bias_F: Tensor | None,
        b_dec_D: Tensor | None,
        xc_BD: Tensor,
        values: list[Tensor],
        supports: list[Support | None],
        latents: list[Tensor | None],
    ) -> tuple[Tensor, ...]:
        ctx.supports = supports
        ctx.save_for_backward(xc_BD, W_enc_FD, *latents)
        # A selection that no term used has no gradient: None then, and not a matrix of zeros to multiply by.
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        xc_BD, W_enc_FD, *latents = ctx.saved_tensors
        grad_x = torch.zeros_like(xc_BD) if ctx.needs_input_grad[0] else None
        grad_FD: Tensor | None = None
        totals_F: Tensor | None = None
        for grad, support, latents_d in zip(grads, ctx.supports, latents, strict=True):
            if grad is None:
                continue
            # z_bj = xc_b . W_j + bias_j, so dW_j = sum_b g_bj xc_b and dbias_j = sum_b g_bj, over the entries that were
            # chosen.
            part_dD, part_d = _weight_gradient(grad, support, xc_BD)
            grad_FD = _added(grad_FD, part_dD, latents_d, W_enc_FD)
            totals_F = _added(totals_F, part_d, latents_d, W_enc_FD[:, 0])
            if grad_x is not None:
                grad_x += _input_gradient(grad, support, W_enc_FD if latents_d is None else W_enc_FD[latents_d])
        if grad_FD is None or totals_F is None:
            grad_FD, totals_F = torch.zeros_like(W_enc_FD), W_enc_FD.new_zeros(len(W_enc_FD))
        grad_bias = totals_F if ctx.needs_input_grad[2] else None
        # xc = x' - b_dec: the gradient of b_dec is minus the sum over tokens of that of xc, which is sum_j (sum_b g_bj)
        # W_j. So no [B, D] gradient has to be made for it.
        grad_b_dec = -(totals_F @ W_enc_FD) if ctx.needs_input_grad[3] else None
        return grad_x, grad_FD, grad_bias, grad_b_dec, None, None, None, None


def _added(total: Tensor | None, part: Tensor, latents_d: Tensor | None, whole: Tensor) -> Tensor:
    """Add a selection's part to a gradient shaped as `whole`; a first part over all latents is it already."""
    if latents_d is None:
        return part if total is None else total + part
    if total is None:
        total = torch.zeros_like(whole, memory_format=torch.contiguous_format)
    return total.index_add_(0, latents_d, part)


def _weight_gradient(grad: Tensor, support: Support | None, xc_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Compute grad^T @ xc and the latents' sums of grad."""
    if support is None:
        return grad.t() @ xc_BD, grad.sum(0)
    return support.latent_gradient(grad, xc_BD)


def _input_gradient(grad: Tensor, support: Support | None, W_FD: Tensor) -> Tensor:
    return grad @ W_FD if support is None else support.row_sums(grad, W_FD)


def encode(
    xn_BD: Float[Tensor, "B D"],
    W_enc_FD: Float[Tensor, "F D"],
    bias_F: Float[Tensor, " F"] | None,
    b_dec_D: Float[Tensor, " D"] | None,
    selections: Sequence[Selection],
    *,
    matmul: str = "float32",
) -> list[Codes]:
    """Compute what each selection keeps of z = (x' - b_dec) W_enc + bias, in the selections' order.

    None of bias and b_dec stand for zero. z is never whole in memory, but for `Everything` and where `Above` keeps so
    many entries that dense products are faster: then all of it comes back. Differentiable; a choice passes no gradient.
    `matmul` bf16 rounds the product's factors to bfloat16, and nothing else. On a GPU a choice of the largest has the
    size asked for, filled up with zeros, and the host waits once for how many entries are above a bound.
    """
    backend = backend_for(xn_BD)
    # The choice passes no gradient, and autograd must not keep z, which is the largest thing of a step.
    with torch.no_grad():
        xc_BD = xn_BD if b_dec_D is None else xn_BD - b_dec_D
        chosen = backend.select(Product(xc_BD, W_enc_FD, bias_F, matmul), selections)
    values: list[Tensor] = []
    supports: list[Support | None] = []
    shapes: list[tuple[int, int]] = []
    for selection, kept in zip(selections, chosen, strict=True):
        latents_d = selection.latents_d
        shapes.append((len(xn_BD), len(W_enc_FD) if latents_d is None else len(latents_d)))
        if isinstance(kept, Entries):
            values.append(kept.values_n)
            supports.append(Support(kept.rows_n, kept.latents_n, shapes[-1], backend))
        else:
            values.append(kept)
            supports.append(None)
    latents = [selection.latents_d for selection in selections]
    z: Sequence[Tensor] = _Encode.apply(xn_BD, W_enc_FD, bias_F, b_dec_D, xc_BD, values, supports, latents)  # type: ignore[no-untyped-call]
    codes = []
    for selection, z_n, support, shape in zip(selections, z, supports, shapes, strict=True):
        if backend.fixed_sizes and isinstance(selection.rule, TopOfBatch | TopPerToken) and selection.rule.positive:
            z_n = z_n.relu()  # what fills the selection up is 0 and takes no gradient
        codes.append(Codes(z_n, support, shape))
    return codes
