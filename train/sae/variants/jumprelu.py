"""JumpReLU: a threshold for each latent, trained through pseudo-derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.base.config import Flag, Real
from train.sae.base import SAE
from train.sae.config import PenaltyConfig
from train.sae.parts.groups import ALONE, RankGroup
from train.sae.parts.ranks import kth_largest
from train.sae.parts.threshold import L0Calibration, find_level, in_parts
from train.sae.sparse.codes import Codes
from train.sae.sparse.rules import Above, Selection, TopOfBatch
from train.sae.step import PLAIN, StepOutput, TrainContext

_WEIGHT = 0.001  # of E[L0], where `sparsity` is None
_WEIGHT_OF_TARGET = {"log": 3.0, "square": 0.3}  # likewise of each target form
_THRESHOLD = 0.001  # the first, where `initial_threshold` is None
_THETA_RATE, _THETA_RATE_TO = 0.3, 192  # theta's share of the learning rate, where it is None, and the D it holds to
_START = 2  # times target_l0: the mean L0 that target_form=log begins at
_START_ROWS = 1024  # tokens it is measured on


class JumpReLUConfig(PenaltyConfig):
    """Settings of JumpReLU."""

    sparsity: Real = Field(ge=0)
    """Coefficient of the mean L0, or of the target form's square; null: 0.001, with `target_l0` 3 (square: 0.3)."""
    target_form: Literal["log", "square"] = "log"
    """What is squared with `target_l0`: the logarithm of L0 / target_l0, or L0 / target_l0 - 1 (the paper's)."""
    bandwidth: Real = Field(0.001, gt=0)
    """Width of the kernel for E||x'||^2 = 1 (the paper's); multiplied by sqrt(E||x'||^2) inside."""
    initial_threshold: Real | None = Field(None, gt=0)
    """Where each threshold starts, in the same units; null: 0.001 (the paper's), and where `target_form` log aims at a
    `target_l0` the one that gives twice that L0."""
    theta_rate: Real | None = Field(None, gt=0)
    """Theta's share of the learning rate; null: 0.3, times D / 192 above D = 192. The paper's is 1."""
    apply_b_dec_to_input: Flag = True
    """Whether the encoder reads x' - b_dec; the paper's does not. Without it each step of W_enc along the mean moves
    every z of a latent at once, which kills latents where the mean is large."""

    @model_validator(mode="before")
    @classmethod
    def _default_weight(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("sparsity") is not None:
            return given
        # `k` is the older name of `target_l0`, which is read after this.
        aims = given.get("target_l0") is not None or given.get("k") is not None
        of_target = _WEIGHT_OF_TARGET.get(str(given.get("target_form", "log")), _WEIGHT)
        return given | {"sparsity": of_target if aims else _WEIGHT}

    @model_validator(mode="after")
    def _reachable(self) -> JumpReLUConfig:
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.width:
            raise ValueError(
                f"target_l0={self.target_l0} cannot be met by {self.width} latents: take a number above 0 and at most "
                "the width"
            )
        return self

    @property
    def aim(self) -> str:
        return f"sparsity={self.sparsity:g}" if self.target_l0 is None else f"target_l0={self.target_l0:g}"


def _of_theta(grad: Tensor, theta: Tensor) -> Tensor:
    """Turn a gradient beside z into one of theta: theta stands beside each z, or once for each latent."""
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
        # K(u) is a box of height 1 and width 1: 1[|z - theta| < eps / 2].
        near = torch.where((z - theta).abs() < eps / 2, grad, 0.0)
        return torch.where(z > theta, grad, 0.0), -(theta / eps) * _of_theta(near, theta), None


class _MeanL0(torch.autograd.Function):
    """Mean over tokens of sum_j 1[z_j > theta_j]; d1/dtheta = -(1 / eps) K((z - theta) / eps), nothing to z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, eps: Tensor, tokens: int) -> Tensor:
        # The slope does not depend on the gradient that comes in: it is made here, so that z and theta need not be kept
        # for the backward.
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

    With `target_l0` the penalty is sparsity * t(r)^2, r = E[L0] / target_l0. `target_form=square`: t(r) = r - 1, the
    paper's. `log`: t(r) = log r above 1 and r - 1 below, alike near 1. The square's gradient at the paper's start,
    where r is 30, stays in Adam's second moment for the rest of a short run and leaves theta hardly any step. It rests
    where 2 sparsity log r is the NMSE's slope in log L0, some 0.05 to 0.1: about 1% above the target.

    Pseudo-derivatives with K(u) = 1[|u| < 1/2], u = (z - theta) / eps, z before the jump: df/dtheta = -(theta / eps)
    K(u), d1[z > theta]/dtheta = -(1 / eps) K(u). `bandwidth` eps and `initial_threshold` are given for E||x'||^2 = 1,
    as in the paper, and multiplied here by sqrt(E||x'||^2). theta itself is the parameter, kept positive.

    Few z of a batch lie within eps of theta, so its gradient is sparse, and Adam's step where there is one is several
    times the rate. At the whole rate that noise kills latents (76 of 512 for 42 on a synthetic dictionary, with a
    NMSE 10% higher), so theta takes `theta_rate` of it. Thresholds are in the unit sqrt(D), and the learning rate falls
    with D: at a share that stays the same, the wanted L0 is out of their reach in a short run where D is large.
    """

    name = "jumprelu"
    Config = JumpReLUConfig
    config: JumpReLUConfig

    def add_state(self) -> None:
        # theta itself and not its logarithm, which would make a step proportional to theta: thresholds near zero would
        # hardly move. `after_step` keeps it positive.
        self.theta = nn.Parameter(self._first_theta().repeat(self.own_width))

    @property
    def rate_shares(self) -> Mapping[str, float]:
        share = self.config.theta_rate
        if share is None:
            share = _THETA_RATE * max(1.0, self.d_in / _THETA_RATE_TO)
        return {} if share == 1 else {"theta": share}

    def _first_theta(self) -> Float[Tensor, ""]:
        share = self.config.initial_threshold
        return (_THRESHOLD if share is None else share) * self.mean_sq.sqrt()

    @property
    def eps(self) -> Float[Tensor, ""]:
        """Return the kernel's width in x' units."""
        return self.config.bandwidth * self.mean_sq.sqrt()

    def dense_encode(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        z_BF = self.pre_activation(xn_BD)
        return torch.where(z_BF > self.theta, z_BF, 0.0)

    def dense_loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> Float[Tensor, ""]:
        z_BF = self.pre_activation(xn_BD)
        f_BF: Tensor = _Jump.apply(z_BF, self.theta, self.eps)  # type: ignore[no-untyped-call]
        xn_hat_BD = f_BF @ self.W_dec + self.beside_latents(xn_BD)
        l0: Tensor = _MeanL0.apply(z_BF, self.theta, self.eps, len(xn_BD))  # type: ignore[no-untyped-call]
        nmse = (xn_hat_BD - context.target_of(xn_BD)).square().sum(1).mean() / self.variance
        return nmse + context.sparsity_scale * self.config.sparsity * self._penalty(l0)

    def encode_sparse(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        (codes,) = self.select(xn_BD, self.bias_F, [Selection(Above(self.theta.detach()))])
        return codes, torch.where(codes.values > codes.at(self.theta), codes.values, 0.0)

    def loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> StepOutput:
        tokens, eps = len(xn_BD), self.eps
        # Half of eps reaches theta, the rest is for rounding.
        (codes,) = self.select(xn_BD, self.bias_F, [Selection(Above(self.theta.detach() - eps))])
        theta = codes.at(self.theta)
        f: Tensor = _Jump.apply(codes.values, theta, eps)  # type: ignore[no-untyped-call]
        # f = 0 below theta, where theta's pseudo-derivative still needs f's.
        nmse, xn_hat_BD = self.reconstruct_sparse(codes, f, xn_BD, context.target_of(xn_BD), through_zeros=True)
        l0: Tensor = _MeanL0.apply(codes.values, theta, eps, tokens)  # type: ignore[no-untyped-call]
        l0 = self.split.total(l0)
        if self.config.target_l0 is not None:
            l0 = context.data.mean(l0)  # the penalty is not linear in it: it is of the batch over all ranks
        sparsity = context.sparsity_scale * self.config.sparsity * self._penalty(l0)
        metrics = {"nmse": nmse.detach(), "l0": l0.detach(), "sparsity": sparsity.detach()}
        return StepOutput(nmse + sparsity, metrics, codes.of(f), xn_hat_BD)

    def _penalty(self, l0: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Compute what `sparsity` multiplies: the mean L0, or the squared distance from its target."""
        if self.config.target_l0 is None:
            return l0
        ratio = l0 / self.config.target_l0
        if self.config.target_form == "square":
            return (ratio - 1).square()
        return torch.where(ratio > 1, ratio.clamp_min(1).log(), ratio - 1).square()

    @torch.no_grad()
    def calibrate_l0(self, batches: Sequence[Float[Tensor, "_ D"]], data: RankGroup = ALONE) -> L0Calibration | None:
        """Multiply every theta by what brings the mean L0 to `target_l0`."""
        if self.config.target_l0 is None:
            return None

        def relative(x_BD: Tensor) -> Tensor:
            return self.pre_activation(self.norm.normalise(x_BD)) / self.theta

        found = find_level(relative, in_parts(batches, self.width), self.config.target_l0, at=1.0, mesh=self.mesh(data))
        self.theta.mul_(found.level).clamp_(min=self.eps * 1e-3)
        return found

    @torch.no_grad()
    def after_step(self, step: StepOutput) -> None:
        self.theta.clamp_(min=self.eps * 1e-3)

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        self.theta.fill_(self._first_theta())
        config = self.config
        if config.target_l0 is None or config.target_form == "square" or config.initial_threshold is not None:
            return
        rows = xn_ND[:_START_ROWS]
        count = max(1, round(_START * config.target_l0 * len(rows)))
        rule = TopOfBatch(min(count, len(rows) * self.own_width))
        (codes,) = self.select(rows, self.bias_F, [Selection(rule)])
        if self.split.size > 1:
            z_n = codes.values.detach()
            z_n = z_n[z_n > 0]
            found = int(self.split.sum_(z_n.new_tensor(len(z_n))))
            if found:
                self.theta.fill_(kth_largest(z_n, min(count, found), self.mesh(ALONE)))
        elif len(codes.values):
            self.theta.fill_(codes.values.min())
