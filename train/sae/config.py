"""The settings that every SAE has, and those that families of them share: checked once, where they are stated.

A variant's own `Config` stands in its file, as a subclass of one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from data.base.config import Flag, Real, Settings, Whole
from data.base.errors import UserError

RETIRED = {"selection": "batch", "auxk_over": "token"}
"""Settings of earlier versions, which only training read, each with the one value that is still trained."""


class SAEConfig(Settings):
    """Settings of any SAE."""

    width: Whole = Field(ge=1)
    """Latents F."""
    input_norm: Literal["none", "dataset", "token"] = "dataset"
    """How x' is made from x: not at all; by one scale, so that E||x'||^2 = D; to mean 0 and spread 1 of each token."""
    apply_b_dec_to_input: Flag = True
    """Whether the encoder reads x' - b_dec, or x'; not of a transcoder, which has a centre of its own."""
    skip: Flag = False
    """Whether a transcoder has a linear path from its input to its output beside the latents (2501.18823)."""

    @property
    def aim(self) -> str:
        """Return what the sparsity aims at, in a few letters."""
        raise NotImplementedError

    @property
    def wanted_l0(self) -> int | float | None:
        """Return the mean L0 that training aims at; None where there is none."""
        return None

    @property
    def dead_raise(self) -> float:
        """Return how far each step raises the biases of dead latents, in root mean squares of x''s entries."""
        return 0.0


class PenaltyConfig(SAEConfig):
    """Settings of a variant whose loss has a sparsity coefficient, which may aim at an L0."""

    target_l0: Whole | Real | None = None
    """The mean L0 that training aims at; null for a fixed coefficient. `k` is an older name of it."""
    revive: Real = Field(0.05, ge=0)
    """How far each step raises a dead latent's biases until it fires, in root mean squares of x''s entries; 0: off."""

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "k" not in given:
            return given
        settings = {name: value for name, value in given.items() if name != "k"}
        k, target = given["k"], settings.get("target_l0")
        if k is not None and target is not None and k != target:
            raise ValueError(f"k={k} is an older name of target_l0={target}: give one of them")
        return settings | {"target_l0": target if k is None else k}

    @property
    def wanted_l0(self) -> int | float | None:
        return self.target_l0

    @property
    def dead_raise(self) -> float:
        return self.revive


class SparsityConfig(PenaltyConfig):
    """Settings of a variant with an L1."""

    sparsity: Real = Field(ge=0)
    """Coefficient of the L1, which is divided by sqrt(Vx); with `target_l0` the one that training starts at."""

    @model_validator(mode="after")
    def _reachable(self) -> SparsityConfig:
        target = self.target_l0
        if target is not None and not (0 < target <= self.width and self.sparsity > 0):
            raise ValueError(
                f"target_l0={target} needs a sparsity above 0 to start from (it is {self.sparsity}) and at most "
                f"{self.width} latents: fix one of them, or set target_l0 to null for a fixed coefficient"
            )
        return self

    @property
    def aim(self) -> str:
        return f"sparsity={self.sparsity:g}" if self.target_l0 is None else f"target_l0={self.target_l0:g}"


class AuxKConfig(SAEConfig):
    """Settings of a variant that keeps the k largest z of each token, or k a token on average, and revives by AuxK."""

    k: Whole = Field(ge=1)
    """Latents a token."""
    auxk_alpha: Real = Field(1 / 32, ge=0)
    """Weight of the loss that revives dead latents (GAO: 1/32); 0: off."""
    auxk_relu: Flag = False
    """Whether relu is taken of its activations, as in the reference, which cannot revive a latent of negative z."""
    auxk_norm: Literal["residual", "variance"] = "residual"
    """What divides it: the variance of the batch's residual (OA, DL), or Vx, which makes it lighter by the NMSE."""
    auxk_k: Whole | None = Field(None, ge=1)
    """Its latents a token; null for the power of two near D / 2 (512 of 768)."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, trained in RETIRED.items():
            if given.get(name, trained) != trained:
                raise ValueError(f"{name}={given[name]} is trained no more: leave it out")
        return {name: value for name, value in given.items() if name not in RETIRED}

    @model_validator(mode="after")
    def _narrow_enough(self) -> AuxKConfig:
        if self.k > self.width:
            raise ValueError(
                f"k={self.k} latents a token cannot be chosen from a width of {self.width}: "
                f"take k from 1 to {self.width}"
            )
        return self

    @property
    def aim(self) -> str:
        return f"k={self.k}"

    @property
    def wanted_l0(self) -> int | float | None:
        return self.k


def transcoder_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give a transcoder's settings: b_dec is of its output; UserError for what has no meaning between two sites."""
    if settings.get("apply_b_dec_to_input"):
        raise UserError(
            "sae.apply_b_dec_to_input=true would subtract the target's b_dec from a transcoder's input: leave it out, "
            "as the encoder has a centre of its own"
        )
    if settings.get("input_norm") == "token":
        raise UserError(
            "sae.input_norm=token would give each token of the target a spread that nobody knows before it is "
            "predicted: take sae.input_norm=dataset for a transcoder"
        )
    return {**settings, "apply_b_dec_to_input": False}
