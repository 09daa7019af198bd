"""What follows a backward: one optimizer step with its projection, clipping and renormalisation, in their order."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from train.sae.base import SAE
from train.sae.decoder import project_gradient_, renormalise_


def update(sae: SAE, optimizer: Optimizer, clip: float | None) -> None:
    """Move the parameters by their gradients, clipped to the norm `clip` over all of them where it is given."""
    if sae.unit_rows:
        project_gradient_(sae.W_dec)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
    optimizer.step()
    if sae.unit_rows:
        renormalise_(sae.W_dec)
