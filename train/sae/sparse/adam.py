"""The numbers of a step of Adam, as a plain value that any backend executes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

WHOLE_ROW = 4096  # entries of a row that one program can hold of gradient, weight and moments


@dataclass(frozen=True)
class AdamStep:
    """Kingma and Ba 1412.6980; decoupled decay by Loshchilov and Hutter 1711.05101."""

    rate: float | Tensor
    """Learning rate of this step; a scalar on the device where the step is captured."""
    decay_1: float
    """Of the mean of the gradient."""
    decay_2: float
    """Of the mean of its square."""
    eps: float
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decay of the weights."""
    decoupled: bool = False
    """Whether the weights decay by themselves (AdamW), and not by way of the gradient."""
    clip: float | None = None
    """Norm of all gradients above which they are scaled down."""
