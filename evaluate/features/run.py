"""`python -m evaluate.features`: the feature pages of the SAE that the settings name, or a server of its own texts."""

from __future__ import annotations

from omegaconf import DictConfig

from data.base.cli import stage_settings
from evaluate.config import FeaturesSettings
from evaluate.features.make import make, one_sae


def main(config: DictConfig) -> None:
    """Run the stage on Hydra's configuration."""
    given = stage_settings(config, "features")
    settings = FeaturesSettings.of(given)
    if settings.serve:
        from evaluate.features.server import serve

        serve(settings, one_sae(settings.folder))
    else:
        print(f"feature pages: {make(given)}")
