"""Sparse autoencoders in plain torch: `load(folder)` gives one, `sae.encode_decode(x)` f and x_hat."""

from train.sae.base import SAE
from train.sae.io import VARIANTS, load, load_config, read_rows, save
from train.sae.parts.auxk import DeadLatents, default_window
from train.sae.parts.init import StartRows
from train.sae.parts.threshold import Calibration
from train.sae.step import Batch, StepOutput, TrainContext

__all__ = [
    "SAE",
    "VARIANTS",
    "Batch",
    "Calibration",
    "DeadLatents",
    "StartRows",
    "StepOutput",
    "TrainContext",
    "default_window",
    "load",
    "load_config",
    "read_rows",
    "save",
]
