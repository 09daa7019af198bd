"""Unit rows of the decoder: the gradient's parallel part goes before the step, the length is restored after it.

A crosscoder's row has a part for each site, and its length is the sum of their norms (Lindsey et al. 2024, "Sparse
crosscoders"): so the activation of a latent is what it adds to all sites together, and TopK's choice and an L1 weigh it
by that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.sae.parts.sites import norms_by_site
from train.sae.sparse.backend import backend_for

_LEAST = 1e-12  # of a length that is divided by


@torch.no_grad()
def project_gradient_(W_dec_FD: nn.Parameter, widths: Sequence[int] | None = None) -> None:
    """Take from the gradient of each (unit) row its parallel part; before clipping, which then does not count it.

    widths: of a crosscoder's sites.
    """
    grad_FD = W_dec_FD.grad
    assert grad_FD is not None, "the gradient is projected after backward"
    if widths is None or len(widths) == 1:
        backend_for(grad_FD).project_rows_(grad_FD, W_dec_FD)
        return
    # The rows with sum_s ||w_s|| = 1 are a surface whose normal is w_s / ||w_s|| at each site: one site's is w itself.
    normal_FD = torch.cat(
        [torch.nn.functional.normalize(part, dim=1) for part in torch.split(W_dec_FD, list(widths), 1)], 1
    )
    along_F1 = (grad_FD * normal_FD).sum(1, keepdim=True) / normal_FD.square().sum(1, keepdim=True).clamp_min(_LEAST)
    grad_FD.sub_(along_F1 * normal_FD)


@torch.no_grad()
def renormalise_(W_dec_FD: Float[Tensor, "F D"], widths: Sequence[int] | None = None) -> None:
    """Divide each row by its length, AFTER the optimizer's step: what is saved is unit. A zero row stays zero.

    widths: of a crosscoder's sites, whose norms sum to the length.
    """
    if widths is None or len(widths) == 1:
        norm_F1 = torch.linalg.vector_norm(W_dec_FD, dim=1, keepdim=True)
    else:
        norm_F1 = norms_by_site(W_dec_FD, widths).sum(0)[:, None]
    W_dec_FD.div_(norm_F1.clamp_min_(_LEAST))
