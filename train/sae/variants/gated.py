"""Gated: which latents fire and how strongly are decided apart."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.sae.config import SparsityConfig
from train.sae.sparse.codes import Codes
from train.sae.sparse.rules import Above, Selection
from train.sae.step import PLAIN, StepOutput, TrainContext
from train.sae.variants.l1_base import L1SAE


class GatedConfig(SparsityConfig):
    """Settings of Gated."""


class Gated(L1SAE):
    """f = 1[pi > 0] relu(mag), pi = h + b_gate, mag = h exp(r_mag) + b_mag, h = (x' - b_dec) W_enc.

    Rajamanoharan et al. 2404.16014.
    Loss = NMSE + sparsity * sum_j relu(pi_j) / sqrt(Vx) + ||x' - (relu(pi) W_dec* + b_dec*)||^2 / Vx, averaged over
    tokens; * is detached (not the b_dec inside h), and the gate 1[pi > 0] passes no gradient. Of a transcoder both
    squared errors are of y', and its skip is detached in the second as b_dec is.
    """

    name = "gated"
    Config = GatedConfig
    config: GatedConfig
    bias_names = ("b_gate", "b_mag")

    b_gate: nn.Parameter
    b_mag: nn.Parameter

    def add_state(self) -> None:
        super().add_state()
        self.r_mag = nn.Parameter(torch.zeros(self.own_width))

    def dense_encode(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        h_BF = self.input_centred(xn_BD) @ self.W_enc
        mag_BF = h_BF * self.r_mag.exp() + self.b_mag
        return torch.where(h_BF + self.b_gate > 0, mag_BF.relu(), 0.0)

    def dense_loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> Float[Tensor, ""]:
        h_BF = self.input_centred(xn_BD) @ self.W_enc
        gate_BF = (h_BF + self.b_gate).relu()
        target_BE, beside = context.target_of(xn_BD), self.beside_latents(xn_BD)
        xn_hat_BD = self.dense_encode(xn_BD) @ self.W_dec + beside
        # The gate's own reconstruction trains W_enc and b_gate, as 1[pi > 0] gives them no gradient; the decoder is
        # detached, or it would learn to decode gates and not magnitudes.
        by_gate_BD = gate_BF @ self.W_dec.detach() + beside.detach()
        squared = (xn_hat_BD - target_BE).square().sum(1).mean() + (by_gate_BD - target_BE).square().sum(1).mean()
        coefficient = context.sparsity_scale * self.config.sparsity * self.sparsity_factor
        return squared / self.variance + coefficient * gate_BF.sum(1).mean() / self.variance.sqrt()

    def margins(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        """Compute pi where the magnitude is positive, else -inf."""
        h_BF = self.input_centred(xn_BD) @ self.W_enc
        mag_BF = h_BF * self.r_mag.exp() + self.b_mag
        return torch.where(mag_BF > 0, h_BF + self.b_gate, -torch.inf)

    def _gate_and_f(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor, Tensor]:
        """Compute codes of h, relu(pi) and f; h > -b_gate is just pi > 0, in floating point too."""
        # h without a bias, as pi and mag are two affine functions of the same product: it is computed once.
        (codes,) = self.select(xn_BD, None, [Selection(Above(-self.b_gate.detach()))])
        pi = codes.values + codes.at(self.b_gate)
        mag = torch.addcmul(codes.at(self.b_mag), codes.values, codes.at(self.r_mag).exp())
        return codes, pi.relu(), torch.where(pi > 0, mag.relu(), 0.0)

    def encode_sparse(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        codes, _, f = self._gate_and_f(xn_BD)
        return codes, f

    def loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> StepOutput:
        codes, gate, f = self._gate_and_f(xn_BD)
        target_BE = context.target_of(xn_BD)
        nmse, xn_hat_BD = self.reconstruct_sparse(codes, f, xn_BD, target_BE)
        sparsity = self.l1_term(self.split.total(self.l1(gate, len(xn_BD))), context)
        auxiliary, _ = self.reconstruct_sparse(codes, gate, xn_BD, target_BE, learns=False)
        metrics = {
            "nmse": nmse.detach(),
            "l0": self.mean_l0(codes, f, context),
            "sparsity": sparsity.detach(),
            "auxiliary": auxiliary.detach(),
        }
        loss = nmse + sparsity + auxiliary
        return self.step_output(context, loss=loss, metrics=metrics, codes=codes.of(f), xn_hat_BD=xn_hat_BD)
