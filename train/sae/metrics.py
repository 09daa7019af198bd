"""Validation: how the form that ships does on held-out activations.

Letters: B tokens in a batch, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from train.sae import SAE


class ReconstructionSums:
    """Sums over held-out tokens in float64; `values()` are ratios of the sums, never means of ratios."""

    def __init__(self, width: int, d_in: int, device: torch.device) -> None:
        at = torch.device("cpu") if device.type == "mps" else device  # Apple's devices have no float64
        self.scalars = torch.zeros(4, dtype=torch.float64, device=at)  # tokens, squared error, squared x, firings
        self.x_D = torch.zeros(d_in, dtype=torch.float64, device=at)
        self.fired_F = torch.zeros(width, dtype=torch.float64, device=at)

    def add(self, x_BD: Tensor, x_hat_BD: Tensor, f_BF: Tensor) -> None:
        at = self.x_D.device
        x_BD, x_hat_BD, active_BF = x_BD.to(at).double(), x_hat_BD.to(at).double(), f_BF.to(at) > 0
        error, square = (x_BD - x_hat_BD).square().sum(), x_BD.square().sum()
        self.scalars += torch.stack([error.new_tensor(len(x_BD)), error, square, active_BF.sum().double()])
        self.x_D += x_BD.sum(0)
        self.fired_F += active_BF.sum(0)

    def values(self) -> dict[str, float]:
        """nmse over the set (= FVU), mean l0, and latents silent over all its tokens."""
        tokens, error, square, firings = self.scalars.tolist()
        spread = square - float(self.x_D.square().sum()) / tokens
        silent = int((self.fired_F == 0).sum())
        return {"nmse": error / spread, "l0": firings / tokens, "silent": silent, "tokens": int(tokens)}


@torch.no_grad()
def held_out(
    saes: Sequence[SAE], batches: Iterable[Tensor], device: torch.device, world: int
) -> list[dict[str, float]]:
    """The figures of each SAE over all ranks' `batches` in model units, which are read once for all."""
    sums = [ReconstructionSums(sae.width, sae.d_in, device) for sae in saes]
    modes = [sae.training for sae in saes]
    for sae in saes:
        sae.eval()  # what ships rounds no factors of the encoder's product
    for x_BD in batches:
        for sae, total in zip(saes, sums, strict=True):
            f_BF, x_hat_BD = sae.encode_decode(x_BD)
            total.add(x_BD, x_hat_BD, f_BF)
    for sae, mode in zip(saes, modes, strict=True):
        sae.train(mode)
    for total in sums if world > 1 else []:
        for tensor in (total.scalars, total.x_D, total.fired_F):
            dist.all_reduce(tensor)
    return [total.values() for total in sums]
