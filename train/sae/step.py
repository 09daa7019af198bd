"""What a training step goes in and comes out with: the batch, what a loss depends on beside it, and what it returns.

Letters: B tokens in a batch, D model width, E width of what is predicted (D but for a transcoder), F latents, d chosen
latents. x is in model units, x' ("xn") normalised, f the latents' activations, y and y' what a transcoder predicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.sae.parts.groups import ALONE, RankGroup
from train.sae.sparse.codes import Codes

_WARM = 0.999  # share of the sparsity coefficient from which on the warm-up counts as over


class Batch(NamedTuple):
    """Activations in model units: what an SAE reads, and what a transcoder predicts of the same tokens."""

    x_BD: Float[Tensor, "B D"]
    target_BE: Float[Tensor, "B E"] | None = None


@dataclass(frozen=True, eq=False)
class TrainContext:
    """What a loss depends on beside its batch."""

    dead_F: Bool[Tensor, " F"] | None = None
    """Latents that AuxK revives, where the variant uses it."""
    may_die_d: Int[Tensor, " d"] | None = None
    """Latents, ascending, outside of which `dead_F` marks none: with it no device is waited for to find the dead."""
    sparsity_scale: float = 1.0
    """Share of the sparsity coefficient in the warm-up, from 0 to 1; only variants with a coefficient use it."""
    settled: float = 1.0
    """How much of the slow start is over, from 0 to 1, of a coefficient that follows a wanted L0."""
    data: RankGroup = ALONE
    """Processes, each with as many tokens, that have one batch together."""
    target_BE: Float[Tensor, "B E"] | None = None
    """y', what a transcoder is to predict, normalised; None for an SAE, which predicts its input."""

    def target_of(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        """Return what the loss compares x_hat' with."""
        return xn_BD if self.target_BE is None else self.target_BE

    @property
    def warmed_up(self) -> bool:
        """Return whether the coefficient's warm-up is over."""
        return self.sparsity_scale >= _WARM


PLAIN = TrainContext()
"""No dead latents, and the whole sparsity coefficient."""


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a loss returns."""

    loss: Float[Tensor, ""]
    """The scalar to differentiate."""
    metrics: dict[str, Tensor]
    """Detached scalars, already weighted where they are terms of the loss; always `nmse` and `l0`."""
    codes: Codes
    """f of the training form, detached."""
    xn_hat_BD: Float[Tensor, "B E"]
    """x_hat' of the training form, detached; of a transcoder y_hat'."""
    min_kept: Float[Tensor, ""] | None = None
    """The smallest z kept of the batch, 0 where fewer than k * B are positive; of BatchTopK and Matryoshka."""
    coefficient: Float[Tensor, ""] | None = None
    """The sparsity coefficient of this step, of the variants with an L1."""
    warmed_up: bool = True
    """Whether the coefficient's warm-up is over."""
    settled: float = 1.0
    """How much of the slow start is over, from 0 to 1, of a coefficient that follows a wanted L0."""

    @property
    def tokens(self) -> int:
        """Return the tokens of the batch."""
        return self.codes.shape[0]

    @property
    def fired_F(self) -> Bool[Tensor, " F"]:
        """Return the latents that fired on any token of the batch."""
        return self.codes.fired(self.codes.values)

    @property
    def figures(self) -> dict[str, Tensor]:
        """Return all scalars that are logged of the step."""
        typed = {"min_kept": self.min_kept, "coefficient": self.coefficient}
        return self.metrics | {name: value for name, value in typed.items() if value is not None}
