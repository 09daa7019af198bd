"""JumpReLU: a threshold for each latent, trained through pseudo-derivatives."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.base.errors import UserError
from train.sae.base import SAE, StepOutput
from train.sae.sparse.encode import Codes
from train.sae.sparse.select import Above
from train.sae.variants.l1_base import check_sparsity

_WEIGHT, _WEIGHT_OF_TARGET = 0.001, 0.3  # of E[L0] and of (E[L0] / k - 1)^2, where `sparsity` is None


def _of_theta(grad: Tensor, theta: Tensor) -> Tensor:
    """A gradient beside z as one of theta: theta stands beside each z, or once for each latent."""
    return grad if grad.shape == theta.shape else grad.sum(0)


class _Jump(torch.autograd.Function):
    """f = z 1[z > theta]; df/dz = 1[z > theta], df/dtheta = -(theta / eps) K(u), u = (z - theta) / eps."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta, eps)
        return torch.where(z > theta, z, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, theta, eps = ctx.saved_tensors
        near = torch.where((z - theta).abs() < eps / 2, grad, 0.0)
        return torch.where(z > theta, grad, 0.0), -(theta / eps) * _of_theta(near, theta), None


class _MeanL0(torch.autograd.Function):
    """Mean over tokens of sum_j 1[z_j > theta_j]; d1/dtheta = -(1 / eps) K((z - theta) / eps), nothing to z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: Tensor, tokens: int) -> Tensor:
        near = _of_theta(((z - theta).abs() < eps / 2).to(z.dtype), theta)
        ctx.save_for_backward(near / (eps * tokens))
        return (z > theta).sum().to(z.dtype) / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return None, -grad * slope, None, None


class JumpReLU(SAE):
    """f = z 1[z > theta]; loss = NMSE + sparsity * E[L0]. Rajamanoharan et al. 2407.14435.

    With `k` the penalty is sparsity * (E[L0] / k - 1)^2, the paper's target form. Pseudo-derivatives with
    K(u) = 1[|u| < 1/2], u = (z - theta) / eps, z before the jump: df/dtheta = -(theta / eps) K(u),
    d1[z > theta]/dtheta = -(1 / eps) K(u). `bandwidth` eps and `initial_threshold` are given for E||x'||^2 = 1, as in
    the paper, and multiplied here by sqrt(E||x'||^2). theta itself is the parameter, kept positive.
    """

    name = "jumprelu"

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        sparsity: float | None = None,
        k: int | float | None = None,
        bandwidth: float = 0.001,
        initial_threshold: float = 0.001,
        input_norm: str = "dataset",
        apply_b_dec_to_input: bool = False,
    ) -> None:
        super().__init__(d_in, width, input_norm=input_norm, apply_b_dec_to_input=apply_b_dec_to_input)
        if bandwidth <= 0 or initial_threshold <= 0:
            raise UserError(f"bandwidth={bandwidth} and initial_threshold={initial_threshold} must both be above 0")
        if k is not None and not 0 < k <= width:
            raise UserError(f"k={k} cannot be met by {width} latents: take a number above 0 and at most the width")
        self.sparsity = sparsity if sparsity is not None else _WEIGHT if k is None else _WEIGHT_OF_TARGET
        self.k = k
        check_sparsity(self.sparsity)
        self.bandwidth, self.initial_threshold = bandwidth, initial_threshold
        self.theta = nn.Parameter(torch.full((width,), float(initial_threshold * self.mean_sq.sqrt())))

    @property
    def eps(self) -> Float[Tensor, ""]:
        """The kernel's width in x' units."""
        return self.bandwidth * self.mean_sq.sqrt()

    def active(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        codes, _ = self.encoded(xn_BD, Above(self.theta.detach()))
        return codes, torch.where(codes.values > codes.at(self.theta), codes.values, 0.0)

    def loss(
        self,
        xn_BD: Float[Tensor, "B D"],
        *,
        dead_F: Bool[Tensor, " F"] | None = None,
        among_d: Int[Tensor, " d"] | None = None,
        sparsity_scale: float = 1.0,
    ) -> StepOutput:
        tokens, eps = len(xn_BD), self.eps
        codes, _ = self.encoded(xn_BD, Above(self.theta.detach() - eps))  # half of eps reaches theta, the rest rounding
        theta = codes.at(self.theta)
        f: Tensor = _Jump.apply(codes.values, theta, eps)  # type: ignore[no-untyped-call]
        xn_hat_BD = self.decoded(codes, f)
        nmse = self.nmse(xn_hat_BD, xn_BD)
        l0: Tensor = _MeanL0.apply(codes.values, theta, eps, tokens)  # type: ignore[no-untyped-call]
        penalty = l0 if self.k is None else (l0 / self.k - 1).square()
        sparsity = sparsity_scale * self.sparsity * penalty
        parts = {"nmse": nmse.detach(), "l0": l0.detach(), "sparsity": sparsity.detach()}
        return StepOutput(nmse + sparsity, parts, codes.of(f), xn_hat_BD.detach())

    @torch.no_grad()
    def after_step(self, step: StepOutput) -> None:
        self.theta.clamp_(min=self.eps * 1e-3)

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        self.theta.fill_(float(self.initial_threshold * self.mean_sq.sqrt()))
