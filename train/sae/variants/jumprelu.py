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
from train.sae.sparse.select import Above, TopOfBatch
from train.sae.variants.l1_base import check_sparsity

_WEIGHT = 0.001  # of E[L0], where `sparsity` is None
_WEIGHT_OF_TARGET = {"log": 3.0, "square": 0.3}  # likewise of a target form
_THRESHOLD = 0.001  # to begin with, where `initial_threshold` is None
_START = 2  # times k: the mean L0 that a run with a target begins at
_START_ROWS = 1024


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

    With `k` the penalty is sparsity * t(E[L0] / k)^2. `target=square`: t(r) = r - 1, the paper's target form.
    `target=log`: t(r) = log r above 1 and r - 1 below, alike near 1; the square's gradient at the start, where r is 30,
    would stay in Adam's second moment for the rest of a short run and leave theta hardly any step. It rests where
    2 sparsity log r is the NMSE's own slope in log L0, some 0.05: r - 1 is below 2% at a sparsity of 3.

    Pseudo-derivatives with K(u) = 1[|u| < 1/2], u = (z - theta) / eps, z before the jump: df/dtheta = -(theta / eps)
    K(u), d1[z > theta]/dtheta = -(1 / eps) K(u). `bandwidth` eps and `initial_threshold` are given for E||x'||^2 = 1,
    as in the paper, and multiplied here by sqrt(E||x'||^2); initial_threshold None is the paper's 0.001, and with
    target=log the one at which the mean L0 starts at 2k. theta itself is the parameter, kept positive.
    """

    name = "jumprelu"

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        sparsity: float | None = None,
        k: int | float | None = None,
        target: str = "log",
        bandwidth: float = 0.001,
        initial_threshold: float | None = None,
        input_norm: str = "dataset",
        apply_b_dec_to_input: bool = False,
    ) -> None:
        super().__init__(d_in, width, input_norm=input_norm, apply_b_dec_to_input=apply_b_dec_to_input)
        if target not in _WEIGHT_OF_TARGET:
            raise UserError(f"target={target!r} is unknown to jumprelu: choose one of {', '.join(_WEIGHT_OF_TARGET)}")
        if bandwidth <= 0:
            raise UserError(f"bandwidth={bandwidth} leaves theta without a gradient: take a number above 0")
        if initial_threshold is not None and initial_threshold <= 0:
            raise UserError(f"initial_threshold={initial_threshold} must be above 0, or null for the default")
        if k is not None and not 0 < k <= width:
            raise UserError(f"k={k} cannot be met by {width} latents: take a number above 0 and at most the width")
        weight = _WEIGHT if k is None else _WEIGHT_OF_TARGET[target]
        self.sparsity = weight if sparsity is None else sparsity
        self.k, self.target = k, target
        check_sparsity(self.sparsity)
        self.bandwidth, self.initial_threshold = bandwidth, initial_threshold
        self.theta = nn.Parameter(torch.full((width,), self._first_threshold()))

    def _first_threshold(self) -> float:
        share = _THRESHOLD if self.initial_threshold is None else self.initial_threshold
        return float(share * self.mean_sq.sqrt())

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
        sparsity = sparsity_scale * self.sparsity * self._penalty(l0)
        parts = {"nmse": nmse.detach(), "l0": l0.detach(), "sparsity": sparsity.detach()}
        return StepOutput(nmse + sparsity, parts, codes.of(f), xn_hat_BD.detach())

    def _penalty(self, l0: Tensor) -> Tensor:
        if self.k is None:
            return l0
        ratio = l0 / self.k
        if self.target == "square":
            return (ratio - 1).square()
        return torch.where(ratio > 1, ratio.clamp_min(1).log(), ratio - 1).square()

    @torch.no_grad()
    def after_step(self, step: StepOutput) -> None:
        self.theta.clamp_(min=self.eps * 1e-3)

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        self.theta.fill_(self._first_threshold())
        if self.k is not None and self.target == "log" and self.initial_threshold is None:
            rows = xn_ND[:_START_ROWS]
            codes, _ = self.encoded(rows, TopOfBatch(max(1, round(_START * self.k * len(rows)))))
            if len(codes.values):
                self.theta.fill_(codes.values.min())
