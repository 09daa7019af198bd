"""Trained weights in another form than their inference form: what the claims on inference and on shrinkage compare.

Letters: B tokens in a batch, N tokens of a set, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from train.sae.base import SAE
from train.sae.sparse.codes import Codes
from train.sae.variants.batchtopk import BatchTopK
from train.sae.variants.relu import ReLU

_RIDGE = 1e-4  # of the mean diagonal; holds latents that hardly fire at scale 1 and shift 0

Variant = TypeVar("Variant", bound=SAE)


def turned(sae: SAE, variant: type[Variant]) -> Variant:
    """Return an SAE of `variant` with the weights and the settings of `sae`, of those that it has too."""
    takes = variant.Config.model_fields
    other = variant(sae.d_in, **{name: value for name, value in sae.config.model_dump().items() if name in takes})
    known = {name: tensor for name, tensor in sae.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(known, strict=False)
    return other.eval()


def with_threshold(sae: SAE, batches: Sequence[Tensor]) -> BatchTopK:
    """Return the SAE's weights under a BatchTopK's threshold,
    calibrated for its k on training batches (model units)."""
    other = turned(sae, BatchTopK)
    other.calibrate(batches)
    return other


class Rescaled(ReLU):
    """f_j = relu(a_j g_j + s_j) where g_j > 0, g the activations of an L1 SAE: which latents fire is left as it is.

    GATED's ablation: does undoing the shrinkage after training do what a gate does?
    """

    scale_F: Tensor
    shift_F: Tensor

    def encode_sparse(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        codes, g = super().encode_sparse(xn_BD)
        return codes, torch.where(g > 0, (g * codes.at(self.scale_F) + codes.at(self.shift_F)).relu(), 0.0)


@torch.no_grad()
def rescaled(sae: SAE, batches: Sequence[Tensor]) -> Rescaled:
    """Return `sae` with the scales and shifts of least squared error on `batches` (model units),
    its decoder left as it is.

    The error is quadratic in both: with phi = [g, 1[g > 0]] the normal equations are
    (phi^T phi) * (W W^T) theta = sum_n phi_n * (W (x'_n - b_dec)), * entry by entry.
    """
    other = turned(sae, Rescaled)
    F = other.width
    other.register_buffer("scale_F", torch.ones(F))
    other.register_buffer("shift_F", torch.zeros(F))
    moments, target = torch.zeros(2 * F, 2 * F), torch.zeros(2 * F)
    for x_BD in batches:
        xn_BD = other.norm.normalise(x_BD)
        g_BF = other.encode_normalised(xn_BD)
        phi_BP = torch.cat([g_BF, (g_BF > 0).float()], 1)
        wanted_BF = (xn_BD - other.b_dec) @ other.W_dec.t()
        moments += phi_BP.t() @ phi_BP
        target += (phi_BP * wanted_BF.repeat(1, 2)).sum(0)
    normal = moments.double() * (other.W_dec @ other.W_dec.t()).repeat(2, 2).double()
    ridge = _RIDGE * normal.diagonal().mean()
    start = torch.cat([torch.ones(F), torch.zeros(F)]).double()
    normal.diagonal().add_(ridge)
    theta = torch.linalg.solve(normal, target.double() + ridge * start)
    other.scale_F.copy_(theta[:F])
    other.shift_F.copy_(theta[F:])
    return other
