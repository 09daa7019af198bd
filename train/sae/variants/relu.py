"""ReLU with an L1 penalty."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.base.errors import UserError
from train.sae.base import StepOutput
from train.sae.sparse.encode import Codes
from train.sae.sparse.select import Above
from train.sae.variants.l1_base import L1SAE

_FORMS = ("april", "bricken")


class ReLU(L1SAE):
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

    def active(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        codes, _ = self.encoded(xn_BD, Above(xn_BD.new_zeros(())))
        return codes, codes.values.relu()

    def loss(
        self,
        xn_BD: Float[Tensor, "B D"],
        *,
        dead_F: Bool[Tensor, " F"] | None = None,
        among_d: Int[Tensor, " d"] | None = None,
        sparsity_scale: float = 1.0,
    ) -> StepOutput:
        (codes, f), tokens = self.active(xn_BD), len(xn_BD)
        xn_hat_BD = self.decoded(codes, f)
        nmse = self.nmse(xn_hat_BD, xn_BD)
        if self.form == "april":
            norm_F = torch.linalg.vector_norm(self.W_dec, dim=1)
            l1 = codes.totals(f) @ norm_F / (tokens * self.variance.sqrt())
        else:
            l1 = self.l1(f, tokens)
        sparsity, told = self.penalised(l1, sparsity_scale)
        parts = {"nmse": nmse.detach(), "l0": codes.l0(f), **told}
        return StepOutput(nmse + sparsity, parts, codes.of(f), xn_hat_BD.detach())
