"""Gated: which latents fire and how strongly are decided apart."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from train.sae.base import StepOutput
from train.sae.sparse.encode import Codes
from train.sae.sparse.select import Above, Selector
from train.sae.variants.l1_base import L1SAE


class Gated(L1SAE):
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

    def encoded(self, xn_BD: Float[Tensor, "B D"], selector: Selector, *aside: Any) -> tuple[Codes, Codes | None]:
        """Codes of h, which has no bias."""
        return self.encode_with(None, xn_BD, selector, *aside)

    def _gate_and_f(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor, Tensor]:
        """Codes of h, relu(pi) and f; h > -b_gate is just pi > 0, in floating point too."""
        codes, _ = self.encoded(xn_BD, Above(-self.b_gate.detach()))
        pi = codes.values + codes.at(self.b_gate)
        mag = torch.addcmul(codes.at(self.b_mag), codes.values, codes.at(self.r_mag).exp())
        return codes, pi.relu(), torch.where(pi > 0, mag.relu(), 0.0)

    def active(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        codes, _, f = self._gate_and_f(xn_BD)
        return codes, f

    def loss(
        self,
        xn_BD: Float[Tensor, "B D"],
        *,
        dead_F: Bool[Tensor, " F"] | None = None,
        among_d: Int[Tensor, " d"] | None = None,
        sparsity_scale: float = 1.0,
    ) -> StepOutput:
        (codes, gate, f), tokens = self._gate_and_f(xn_BD), len(xn_BD)
        xn_hat_BD = self.decoded(codes, f)
        nmse = self.nmse(xn_hat_BD, xn_BD)
        sparsity, told = self.penalised(self.l1(gate, tokens), sparsity_scale)
        by_gate_BD = codes.decode(gate, self.W_dec.detach())[0] + self.b_dec.detach()
        auxiliary = self.nmse(by_gate_BD, xn_BD)
        parts = {"nmse": nmse.detach(), "l0": codes.l0(f), **told, "auxiliary": auxiliary.detach()}
        return StepOutput(nmse + sparsity + auxiliary, parts, codes.of(f), xn_hat_BD.detach())
