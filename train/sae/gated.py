"""Gated: which latents fire and how strongly are decided apart."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from train.sae.base import Step
from train.sae.penalty import PenalisedSAE


class Gated(PenalisedSAE):
    """f = 1[pi > 0] relu(mag), pi = h + b_gate, mag = h exp(r_mag) + b_mag, h = (x' - b_dec) W_enc.

    Rajamanoharan et al. 2404.16014.
    Loss = NMSE + sparsity * sum_j relu(pi_j) / sqrt(Vx) + ||x' - (relu(pi) W_dec* + b_dec*)||^2 / Vx, averaged over
    tokens; * is detached (not the b_dec inside h), and the gate 1[pi > 0] passes no gradient.
    """

    name = "gated"
    bias_names = ("b_gate", "b_mag")

    b_gate: nn.Parameter
    b_mag: nn.Parameter

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        sparsity: float,
        k: int | float | None = None,
        input_norm: str = "dataset",
        apply_b_dec_to_input: bool = True,
    ) -> None:
        super().__init__(
            d_in, width, sparsity=sparsity, k=k, input_norm=input_norm, apply_b_dec_to_input=apply_b_dec_to_input
        )
        self.r_mag = nn.Parameter(torch.zeros(width))

    def _gate_and_f(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B F"]]:
        """pi and f."""
        h_BF = self.input_centred(xn_BD) @ self.W_enc
        pi_BF = h_BF + self.b_gate
        mag_BF = torch.addcmul(self.b_mag, h_BF, self.r_mag.exp())
        return pi_BF, torch.where(pi_BF > 0, mag_BF.relu(), 0.0)

    def activate(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        return self._gate_and_f(xn_BD)[1]

    def loss(
        self, xn_BD: Float[Tensor, "B D"], *, dead_F: Bool[Tensor, " F"] | None = None, sparsity_scale: float = 1.0
    ) -> Step:
        pi_BF, f_BF = self._gate_and_f(xn_BD)
        nmse = self.nmse(self.decode_normalised(f_BF), xn_BD)
        gate_BF = pi_BF.relu()
        sparsity, told = self.penalised(self.l1(gate_BF), sparsity_scale)
        auxiliary = self.nmse(torch.addmm(self.b_dec.detach(), gate_BF, self.W_dec.detach()), xn_BD)
        parts = {
            "nmse": nmse.detach(),
            "l0": f_BF.count_nonzero() / f_BF.shape[0],
            **told,
            "auxiliary": auxiliary.detach(),
        }
        return Step(loss=nmse + sparsity + auxiliary, parts=parts, f_BF=f_BF.detach())
