"""JumpReLU: a threshold for each latent, trained through pseudo-derivatives."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.errors import UserError
from train.sae.base import SAE, Step
from train.sae.penalty import check_sparsity

_WEIGHT, _WEIGHT_OF_TARGET = 0.001, 0.3  # of E[L0] and of (E[L0] / k - 1)^2, where `sparsity` is None


class _Jump(torch.autograd.Function):
    """f = z 1[z > theta]; df/dz = 1[z > theta], df/dtheta = -(theta / eps) K(u), u = (z - theta) / eps."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, theta_F: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(z_BF, theta_F, eps)
        return torch.where(z_BF > theta_F, z_BF, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Tensor, Tensor, None]:
        z_BF, theta_F, eps = ctx.saved_tensors
        near_F = torch.where((z_BF - theta_F).abs() < eps / 2, grad_BF, 0.0).sum(0)
        return torch.where(z_BF > theta_F, grad_BF, 0.0), -(theta_F / eps) * near_F, None


class _MeanL0(torch.autograd.Function):
    """Mean over tokens of sum_j 1[z_j > theta_j]; d1/dtheta = -(1 / eps) K((z - theta) / eps), nothing to z."""

    @staticmethod
    def forward(ctx: Any, z_BF: Tensor, theta_F: Tensor, eps: Tensor) -> Tensor:
        near_F = ((z_BF - theta_F).abs() < eps / 2).sum(0)
        ctx.save_for_backward(near_F / (eps * z_BF.shape[0]))
        return (z_BF > theta_F).sum() / z_BF.new_tensor(z_BF.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (slope_F,) = ctx.saved_tensors
        return None, -grad * slope_F, None


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

    def activate(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        z_BF = self.pre_activation(xn_BD)
        return torch.where(z_BF > self.theta, z_BF, 0.0)

    def loss(
        self, xn_BD: Float[Tensor, "B D"], *, dead_F: Bool[Tensor, " F"] | None = None, sparsity_scale: float = 1.0
    ) -> Step:
        z_BF, eps = self.pre_activation(xn_BD), self.eps
        f_BF: Tensor = _Jump.apply(z_BF, self.theta, eps)  # type: ignore[no-untyped-call]
        nmse = self.nmse(self.decode_normalised(f_BF), xn_BD)
        l0: Tensor = _MeanL0.apply(z_BF, self.theta, eps)  # type: ignore[no-untyped-call]
        penalty = l0 if self.k is None else (l0 / self.k - 1).square()
        sparsity = sparsity_scale * self.sparsity * penalty
        parts = {"nmse": nmse.detach(), "l0": l0.detach(), "sparsity": sparsity.detach()}
        return Step(loss=nmse + sparsity, parts=parts, f_BF=f_BF.detach())

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        self.theta.clamp_(min=self.eps * 1e-3)

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        self.theta.fill_(float(self.initial_threshold * self.mean_sq.sqrt()))
