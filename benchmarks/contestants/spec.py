"""What every contestant of `benchmarks.step` is asked to do, and what they all need for it.

Letters: B tokens in a batch, D model width, F latents. Only torch and the standard library: the peers' environment has
no more of ours.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

VARIANTS = ("topk", "batchtopk", "matryoshka", "relu", "gated", "jumprelu")
SELECTING = ("topk", "batchtopk", "matryoshka")  # k latents a token, and AuxK; the others pay for activity
PREFIXES = (0.03125, 0.09375, 0.21875, 0.46875, 1.0)  # Matryoshka's, as shares of F
LR = 1e-9  # activity and dead latents stay as they were set; a step costs the same at any rate
LONG_SILENT = 10**9  # tokens (or steps): beyond every contestant's window
AUXK = 1 / 32


@dataclass(frozen=True)
class Spec:
    """One cell of the table. `dead`: share of latents that are dead; `l0`: activity where k does not set it."""

    variant: str
    d_model: int
    width: int
    k: int
    batch: int
    dead: float = 0.0
    l0: float = 100.0
    device: str = "cpu"
    precision: str = "float32"

    @property
    def activity(self) -> float:
        """Return the mean latents active on a token."""
        return self.k if self.variant in SELECTING else self.l0

    @property
    def prefixes(self) -> list[int]:
        """Return matryoshka's nested widths."""
        return [round(share * self.width) for share in PREFIXES]

    def dead_latents(self) -> Tensor:
        """Return the indices of the dead ones, evenly spread."""
        index = torch.arange(self.width, device=self.device)
        return index[(index + 1) * self.dead // 1 > index * self.dead // 1]

    def autocast(self) -> AbstractContextManager[object]:
        if self.precision == "bf16":
            return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16)
        return nullcontext()


class Contestant(Protocol):
    def step(self, x_BD: Tensor) -> object:
        """Return one whole training step."""

    def facts(self, x_BD: Tensor) -> dict[str, float]:
        """Return what shows that the step did the work asked for:
        l0, dead (latents that count as dead), auxk (its loss)."""


def level(z_BF: Tensor, activity: float) -> float:
    """Return the value that `activity` entries of a row exceed, over the rows' mean."""
    flat = z_BF.detach().flatten()
    return float(flat.kthvalue(flat.numel() - round(activity * z_BF.shape[0])).values)


def mean_l0(f_BF: Tensor) -> float:
    return float((f_BF != 0).sum() / f_BF.shape[0])
