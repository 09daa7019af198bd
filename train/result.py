"""What a call of `train.train` gives back: the folder, its record, and the SAE itself when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from data.base.records import Json

if TYPE_CHECKING:
    from train.sae import SAE


@dataclass(frozen=True)
class TrainResult:
    """A finished training.

    folder: where the SAE, its record, metrics.csv and the last checkpoint are.
    """

    folder: Path

    @cached_property
    def record(self) -> Json:
        """Read config.json: the variant, its settings, the store and site, and how the training went."""
        from train.sae import load_config

        return load_config(self.folder)

    @property
    def heldout(self) -> dict[str, float]:
        """Return the inference form's figures on held-out rows, {} where there were none.

        `nmse`, `l0`, `silent` (latents that never fired) and `tokens`.
        """
        return dict(self.record["training"]["heldout"] or {})

    @cached_property
    def sae(self) -> SAE:
        """Load the SAE, on the CPU."""
        from train.sae import load

        return load(self.folder)

    def __str__(self) -> str:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in self.heldout.items())
        target = f" to {self.record['target']}" if "target" in self.record else ""
        from train.sae.io import site_of

        return f"{self.record['variant']} at {site_of(self.record)}{target}  {figures}  -> {self.folder}"
