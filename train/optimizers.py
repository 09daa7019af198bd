"""The optimizers by name: the only classes that a run's settings can choose.

adam8bit is bitsandbytes' Adam, whose moments have 8 bits an entry and a float32 scale for 256 of them (Dettmers et al.
2110.02861); parameters of less than 4,096 entries have float32 ones. So 6 bytes an entry live between two steps in
place of Adam's 12. On a GPU the host waits for it once a parameter; on a CPU it is some 20 times slower than Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from train.config import OptimizerSettings, check_installed

OptimizerFactory = Callable[[Iterable[Tensor] | Iterable[dict[str, Any]]], Optimizer]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class that a setting names; UserError where its extra is not installed."""
    if name != "adam8bit":
        return OPTIMIZERS[name]
    check_installed(name)
    # Imported where it is asked for: it looks for a GPU's libraries as it is loaded.
    from bitsandbytes.optim import Adam8bit

    chosen: type[Optimizer] = Adam8bit
    return chosen


def optimizer_from(settings: OptimizerSettings) -> OptimizerFactory:
    """Choose what makes the optimizer of given parameters."""
    return partial(optimizer_class(settings.name), **settings.arguments())
