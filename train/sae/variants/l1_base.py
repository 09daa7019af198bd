"""What the variants with an L1 share: its coefficient, given or following a wanted L0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from train.sae.base import SAE
from train.sae.config import SparsityConfig
from train.sae.parts.groups import ALONE, RankGroup
from train.sae.parts.threshold import L0Calibration, find_level, in_parts
from train.sae.sparse.codes import Codes
from train.sae.step import StepOutput, TrainContext

# Of the coefficient's logarithm a step, at an L0 e times too large or more: at first, and once it has settled.
_FIRST_RATE, _RATE = 0.0025, 0.1


class L1SAE(SAE):
    """A loss with `sparsity` * `sparsity_factor` * an L1.

    With `target_l0` the coefficient starts at `sparsity` and follows the mean L0 of the training batches: once it is
    warmed up, each step multiplies the factor by exp(rate * log(L0 / target_l0)), the logarithm held within +-1, so
    that L0 settles about the target, and `calibrate_l0` removes what is left after training. Not in the papers; it
    spares a search where variants are compared at equal L0. The rate rises from 0.0025 to 0.1, by the same factor each
    step, over the first 175 steps (at most half of the run). L0 begins far above the target, as it does with a
    coefficient that stays the same, and features form before it comes down: at 0.05 all along Gated's NMSE on a
    synthetic dictionary was half as large again (benchmarks/RESULTS.md).
    Without `target_l0` the factor stays 1.
    """

    config: SparsityConfig
    sparsity_factor: Tensor

    def add_state(self) -> None:
        self.register_buffer("sparsity_factor", torch.ones(()))

    def margins(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """Compute what decides which latents fire: a latent is active where it is above 0."""
        return self.pre_activation(xn_BD)

    @torch.no_grad()
    def calibrate_l0(self, batches: Sequence[Float[Tensor, "_ D"]], data: RankGroup = ALONE) -> L0Calibration | None:
        """Lower the bias of every z by what brings the mean L0 to `target_l0`."""
        if self.config.target_l0 is None:
            return None
        normalised = in_parts([self.norm.normalise(x_BD) for x_BD in batches], self.width)
        found = find_level(self.margins, normalised, self.config.target_l0, at=0.0, mesh=self.mesh(data))
        self.bias_F.sub_(found.level)
        return found

    def mean_l0(self, codes: Codes, f: Tensor, context: TrainContext) -> Float[Tensor, ""]:
        """Compute the mean L0 of the batch, over all ranks where the coefficient follows it."""
        return self.l0(codes, f, ALONE if self.config.target_l0 is None else context.data)

    def coefficient(self, context: TrainContext) -> Float[Tensor, ""]:
        """Compute the L1's coefficient at this step."""
        scale = torch.full_like(self.sparsity_factor, context.sparsity_scale)
        return scale * self.config.sparsity * self.sparsity_factor

    def l1_term(self, l1: Tensor, context: TrainContext) -> Float[Tensor, ""]:
        """Compute the L1's term of the loss."""
        return context.sparsity_scale * self.config.sparsity * self.sparsity_factor * l1

    def step_output(self, context: TrainContext, **fields: Any) -> StepOutput:
        """Give a step's report with the coefficient in it."""
        return StepOutput(
            coefficient=self.coefficient(context), warmed_up=context.warmed_up, settled=context.settled, **fields
        )

    @torch.no_grad()
    def after_step(self, step: StepOutput) -> None:
        # In the warm-up L0 says little about the coefficient that will hold.
        if self.config.target_l0 is None or not step.warmed_up:
            return
        error = (step.metrics["l0"] / self.config.target_l0).clamp_min(1e-3).log().clamp(-1, 1)
        rate = _FIRST_RATE * (_RATE / _FIRST_RATE) ** step.settled
        self.sparsity_factor.mul_((rate * error).exp())
