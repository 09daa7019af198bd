"""What the variants with an L1 share: their coefficient, fixed or following a wanted L0."""

from __future__ import annotations

import torch
from torch import Tensor

from data.base.errors import UserError
from train.sae.base import SAE, StepOutput

_RATE = 0.05  # of the coefficient's logarithm a step, at an L0 e times too large or more


def check_sparsity(sparsity: float) -> None:
    """Refuse a coefficient that rewards activity."""
    if not 0 <= sparsity < float("inf"):
        raise UserError(f"sparsity={sparsity} is no penalty: take a finite coefficient of 0 or more")


class L1SAE(SAE):
    """A loss with `sparsity` * `sparsity_factor` * an L1.

    With `k` the coefficient starts at `sparsity` and follows the mean L0 of the training batches: once it is warmed up,
    each step multiplies the factor by exp(0.05 * log(L0 / k)), the logarithm held within +-1, so that L0 settles about
    k. Not in the papers; it spares a search where variants are compared at equal L0. Without `k` the factor stays 1.
    """

    sparsity_factor: Tensor

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        sparsity: float,
        k: int | float | None,
        input_norm: str,
        apply_b_dec_to_input: bool,
    ) -> None:
        super().__init__(d_in, width, input_norm=input_norm, apply_b_dec_to_input=apply_b_dec_to_input)
        check_sparsity(sparsity)
        if k is not None and not (0 < k <= width and sparsity > 0):
            raise UserError(
                f"k={k} needs a sparsity above 0 to start from (it is {sparsity}) and at most {width} latents: "
                "mend one of them, or set k to null for a fixed coefficient"
            )
        self.sparsity, self.k = sparsity, k
        self.register_buffer("sparsity_factor", torch.ones(()))

    def penalised(self, l1: Tensor, sparsity_scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The L1's term of the loss, and what a step reports of it."""
        term = sparsity_scale * self.sparsity * self.sparsity_factor * l1
        scale = torch.full_like(self.sparsity_factor, sparsity_scale)
        return term, {"sparsity": term.detach(), "coefficient": scale * self.sparsity * self.sparsity_factor}

    @torch.no_grad()
    def after_step(self, step: StepOutput) -> None:
        if self.k is None:
            return
        error = (step.parts["l0"] / self.k).clamp_min(1e-3).log().clamp(-1, 1)
        # In the warm-up L0 says little about the coefficient that will hold.
        warm = step.parts["coefficient"] >= 0.999 * self.sparsity * self.sparsity_factor
        self.sparsity_factor.mul_(torch.where(warm, (_RATE * error).exp(), 1.0))
