"""Unit rows of the decoder: the gradient's parallel part goes before the step, the length is restored after it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.sae.sparse.backend import backend_for


@torch.no_grad()
def project_gradient_(W_dec_FD: nn.Parameter) -> None:
    """Take from the gradient of each (unit) row its parallel part; before clipping, which then does not count it."""
    grad_FD = W_dec_FD.grad
    assert grad_FD is not None, "the gradient is projected after backward"
    backend_for(grad_FD).project_rows_(grad_FD, W_dec_FD)


@torch.no_grad()
def renormalise_(W_dec_FD: Float[Tensor, "F D"]) -> None:
    """Divide each row by its length, AFTER the optimizer's step: what is saved is unit. A zero row stays zero."""
    norm_F1 = torch.linalg.vector_norm(W_dec_FD, dim=1, keepdim=True)
    W_dec_FD.div_(norm_F1.clamp_min_(1e-12))
