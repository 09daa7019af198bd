"""The optimizers by name: the only classes that a run's settings can choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from train.config import OptimizerSettings

OptimizerFactory = Callable[[Iterable[Tensor] | Iterable[dict[str, Any]]], Optimizer]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def optimizer_from(settings: OptimizerSettings) -> OptimizerFactory:
    """Choose what makes the optimizer of given parameters."""
    return partial(OPTIMIZERS[settings.name], **settings.arguments())
