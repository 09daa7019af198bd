"""ReLU with an L1 penalty."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from data.base.config import Flag
from train.sae.config import SparsityConfig
from train.sae.sparse.codes import Codes
from train.sae.sparse.rules import Above, Selection
from train.sae.step import PLAIN, StepOutput, TrainContext
from train.sae.variants.l1_base import L1SAE


class ReLUConfig(SparsityConfig):
    """Settings of ReLU."""

    form: Literal["april", "bricken"] = "april"
    """`april`: free decoder rows, f_j weighted by their norms; `bricken`: unit rows."""
    apply_b_dec_to_input: Flag = False
    """Whether the encoder reads x' - b_dec: not in April's form, but in Bricken's."""


class ReLU(L1SAE):
    """f = relu(z); loss = NMSE + sparsity * S / sqrt(Vx), S averaged over tokens.

    `april` (Anthropic, April 2024 update; default): rows of W_dec free, S = sum_j f_j ||W_dec_j||; of a crosscoder
    S = sum_j f_j sum_s ||W_dec_j,s|| over its sites s (Lindsey et al. 2024).
    `bricken` (Bricken et al. 2023, the baseline of Rajamanoharan et al. 2404.16014): unit rows, S = sum_j f_j.
    """

    name = "relu"
    Config = ReLUConfig
    config: ReLUConfig

    def add_state(self) -> None:
        super().add_state()
        self.unit_rows = self.config.form == "bricken"

    def dense_encode(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        return self.pre_activation(xn_BD).relu()

    def dense_loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> Float[Tensor, ""]:
        f_BF = self.pre_activation(xn_BD).relu()
        xn_hat_BD = f_BF @ self.W_dec + self.beside_latents(xn_BD)
        # sum_s ||W_dec_j,s|| over the sites of a crosscoder; else there is one.
        parts = [part.norm(dim=1) for part in torch.split(self.W_dec, list(self.norm_out.widths), 1)]
        norm_F = torch.stack(parts).sum(0) if self.config.form == "april" else torch.ones_like(self.bias_F)
        l1 = (f_BF * norm_F).sum(1).mean() / self.variance.sqrt()
        coefficient = context.sparsity_scale * self.config.sparsity * self.sparsity_factor
        squared = (xn_hat_BD - context.target_of(xn_BD)).square().sum(1).mean()
        return squared / self.variance + coefficient * l1

    def encode_sparse(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        (codes,) = self.select(xn_BD, self.bias_F, [Selection(Above(xn_BD.new_zeros(())))])
        return codes, codes.values.relu()

    def loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> StepOutput:
        codes, f = self.encode_sparse(xn_BD)
        nmse, xn_hat_BD = self.reconstruct_sparse(codes, f, xn_BD, context.target_of(xn_BD))
        if self.config.form == "april":
            # sum_j f_j ||W_dec_j|| summed over tokens first: the norms are then multiplied once and not for each entry.
            l1 = codes.totals(f) @ self.row_norms_F / (len(xn_BD) * self.variance.sqrt())
        else:
            l1 = self.l1(f, len(xn_BD))
        sparsity = self.l1_term(self.split.total(l1), context)
        metrics = {"nmse": nmse.detach(), "l0": self.mean_l0(codes, f, context), "sparsity": sparsity.detach()}
        return self.step_output(context, loss=nmse + sparsity, metrics=metrics, codes=codes.of(f), xn_hat_BD=xn_hat_BD)
