"""ReLU with an L1 penalty."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.errors import UserError
from train.sae.base import Step
from train.sae.penalty import PenalisedSAE

_FORMS = ("april", "bricken")


class ReLU(PenalisedSAE):
    """f = relu(z); loss = NMSE + sparsity * S / sqrt(Vx), S averaged over tokens.

    `april` (Anthropic, April 2024 update; default): rows of W_dec free, S = sum_j f_j ||W_dec_j||.
    `bricken` (Bricken et al. 2023, the baseline of Rajamanoharan et al. 2404.16014): unit rows, S = sum_j f_j.
    """

    name = "relu"

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        sparsity: float,
        k: int | float | None = None,
        form: str = "april",
        input_norm: str = "dataset",
        apply_b_dec_to_input: bool = False,
    ) -> None:
        super().__init__(
            d_in, width, sparsity=sparsity, k=k, input_norm=input_norm, apply_b_dec_to_input=apply_b_dec_to_input
        )
        if form not in _FORMS:
            raise UserError(f"form={form!r} is unknown to relu: choose one of {', '.join(_FORMS)}")
        self.form = form
        self.unit_rows = form == "bricken"

    def activate(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        return self.pre_activation(xn_BD).relu()

    def loss(
        self, xn_BD: Float[Tensor, "B D"], *, dead_F: Bool[Tensor, " F"] | None = None, sparsity_scale: float = 1.0
    ) -> Step:
        f_BF = self.activate(xn_BD)
        nmse = self.nmse(self.decode_normalised(f_BF), xn_BD)
        if self.form == "april":
            mean_F = f_BF.mean(0)
            l1 = mean_F @ torch.linalg.vector_norm(self.W_dec, dim=1) / self.variance.sqrt()
        else:
            l1 = self.l1(f_BF)
        sparsity, told = self.penalised(l1, sparsity_scale)
        parts = {"nmse": nmse.detach(), "l0": f_BF.count_nonzero() / f_BF.shape[0], **told}
        return Step(loss=nmse + sparsity, parts=parts, f_BF=f_BF.detach())
