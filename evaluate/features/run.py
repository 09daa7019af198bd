"""`python -m evaluate.features`: the feature pages of the SAE that the settings name."""

from __future__ import annotations

from omegaconf import DictConfig

from data.base.cli import stage_settings
from evaluate.features.make import make


def main(config: DictConfig) -> None:
    """Run the stage on Hydra's configuration."""
    print(f"feature pages: {make(stage_settings(config, 'features'))}")
