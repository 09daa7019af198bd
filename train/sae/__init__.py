"""Sparse autoencoders in plain torch: `load(folder)` gives one, `sae.run(x)` its activations and reconstruction."""

from train.sae.base import SAE, StepOutput
from train.sae.io import VARIANTS, load, load_config, save
from train.sae.parts.auxk import DeadLatents, default_window
from train.sae.parts.threshold import Calibration

__all__ = [
    "SAE",
    "VARIANTS",
    "Calibration",
    "DeadLatents",
    "StepOutput",
    "default_window",
    "load",
    "load_config",
    "save",
]
