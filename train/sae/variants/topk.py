"""TopK, and what the TopK family shares: k, and AuxK for dead latents."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.base.errors import UserError
from train.sae.base import SAE, StepOutput
from train.sae.parts.auxk import auxk_error, auxk_selector, auxk_size
from train.sae.sparse import fixed
from train.sae.sparse.encode import Codes
from train.sae.sparse.select import Selector, TopPerToken

_AUXK_NORMS = ("variance", "residual")
_AUXK_OVER = ("token", "batch")

Aside = tuple[Codes, Tensor, Tensor | None]  # z of the dead latents, which they are, which of them are not dead


class TopKBase(SAE):
    """k latents a token (or k * B a batch), and AuxK.

    auxk_alpha: weight of AuxK (1/32). auxk_relu: take relu of its activations, the reference form. auxk_norm: divide
    it by Vx (`variance`) or by the variance of the batch's residual (`residual`: OA and DL, heavier by 1 / NMSE).
    auxk_k: its latents a token, None for the power of two near D / 2. auxk_over: they are the largest of each
    `token`, or on average so many, the largest of the `batch` (the future work of BatchTopK's authors).
    """

    uses_auxk = True

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        k: int,
        input_norm: str = "dataset",
        apply_b_dec_to_input: bool = True,
        auxk_alpha: float = 1 / 32,
        auxk_relu: bool = False,
        auxk_norm: str = "variance",
        auxk_k: int | None = None,
        auxk_over: str = "token",
    ) -> None:
        super().__init__(d_in, width, input_norm=input_norm, apply_b_dec_to_input=apply_b_dec_to_input)
        if not 1 <= k <= width:
            raise UserError(f"k={k} latents a token cannot be chosen from a width of {width}: take k from 1 to {width}")
        if auxk_norm not in _AUXK_NORMS:
            raise UserError(f"auxk_norm={auxk_norm!r} is unknown: choose one of {', '.join(_AUXK_NORMS)}")
        if auxk_over not in _AUXK_OVER:
            raise UserError(f"auxk_over={auxk_over!r} is unknown: choose one of {', '.join(_AUXK_OVER)}")
        if auxk_k is not None and auxk_k < 1:
            raise UserError(f"auxk_k={auxk_k} chooses nothing: take 1 or more, or null for the power of two near D / 2")
        if auxk_alpha < 0:
            raise UserError(f"auxk_alpha={auxk_alpha} would reward silent latents: take 0 (off) or more")
        self.k = k
        self.auxk_alpha, self.auxk_relu, self.auxk_norm = auxk_alpha, auxk_relu, auxk_norm
        self.auxk_k, self.auxk_over = auxk_k, auxk_over

    @property
    def k_aux(self) -> int:
        """Latents a token that AuxK takes."""
        return auxk_size(self.d_in) if self.auxk_k is None else self.auxk_k

    def with_dead(
        self,
        xn_BD: Float[Tensor, "B D"],
        selector: Selector,
        dead_F: Bool[Tensor, " F"] | None,
        among_d: Int[Tensor, " d"] | None,
    ) -> tuple[Codes, Aside | None]:
        """The z that `selector` keeps, and those that AuxK will want."""
        if dead_F is None or not self.auxk_alpha:
            return self.encoded(xn_BD, selector)[0], None
        dead_d = dead_F.nonzero().squeeze(1) if among_d is None else among_d
        if not len(dead_d):
            return self.encoded(xn_BD, selector)[0], None
        live_d = None if among_d is None else ~dead_F.index_select(0, among_d)
        tokens = len(xn_BD) if self.auxk_over == "batch" else None
        picked = auxk_selector(self.k_aux, len(dead_d), tokens, on_gpu=fixed.wanted(xn_BD))
        codes, aside = self.encoded(xn_BD, selector, dead_d, picked, live_d)
        return codes, None if aside is None else (aside, dead_d, live_d)

    def auxk(self, aside: Aside | None, residual_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        """alpha * AuxK's squared error over Vx (or over the residual's variance); `residual_BD` detached."""
        if aside is None:
            return residual_BD.new_zeros(())
        codes, dead_d, live_d = aside
        W_dead_dD = self.W_dec.index_select(0, dead_d)
        over_batch = self.auxk_over == "batch"
        error = auxk_error(
            codes, residual_BD, W_dead_dD, k=self.k_aux, relu=self.auxk_relu, over_batch=over_batch, live_d=live_d
        )
        if live_d is not None:
            error = torch.where(live_d.all(), 0.0, error)
        over = self.variance
        if self.auxk_norm == "residual":
            spread = (residual_BD - residual_BD.mean(0)).square().sum() / residual_BD.shape[0]
            over = spread.clamp_min(torch.finfo(spread.dtype).eps * self.variance)
        return self.auxk_alpha * error / over


class TopK(TopKBase):
    """f = relu of the k largest z of each token; loss = NMSE + AuxK. Gao et al. 2406.04093.

    `multi_topk` adds L(4k) / 8, the NMSE of the reconstruction by the 4k largest; its gradient reaches the encoder.
    Without `tied_init` a latent's encoder starts in another's direction, unrelated to its decoder row (GAO's ablation).
    """

    name = "topk"

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        k: int,
        input_norm: str = "dataset",
        apply_b_dec_to_input: bool = True,
        auxk_alpha: float = 1 / 32,
        auxk_relu: bool = False,
        auxk_norm: str = "variance",
        auxk_k: int | None = None,
        auxk_over: str = "token",
        multi_topk: bool = False,
        tied_init: bool = True,
    ) -> None:
        super().__init__(
            d_in,
            width,
            k=k,
            input_norm=input_norm,
            apply_b_dec_to_input=apply_b_dec_to_input,
            auxk_alpha=auxk_alpha,
            auxk_relu=auxk_relu,
            auxk_norm=auxk_norm,
            auxk_k=auxk_k,
            auxk_over=auxk_over,
        )
        if multi_topk and 4 * k > width:
            raise UserError(
                f"multi_topk takes 4k={4 * k} latents a token from a width of {width}: lower k or widen the SAE"
            )
        self.multi_topk, self.tied_init = multi_topk, tied_init

    def active(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        codes, _ = self.encoded(xn_BD, TopPerToken(self.k))
        return codes, codes.values

    def loss(
        self,
        xn_BD: Float[Tensor, "B D"],
        *,
        dead_F: Bool[Tensor, " F"] | None = None,
        among_d: Int[Tensor, " d"] | None = None,
        sparsity_scale: float = 1.0,
    ) -> StepOutput:
        codes, aside = self.with_dead(xn_BD, TopPerToken(4 * self.k if self.multi_topk else self.k), dead_F, among_d)
        wide, codes = codes, codes.top_of_rows(self.k) if self.multi_topk else codes
        xn_hat_BD = self.decoded(codes, codes.values)
        nmse = self.nmse(xn_hat_BD, xn_BD)
        auxk = self.auxk(aside, (xn_BD - xn_hat_BD).detach())
        parts = {"nmse": nmse.detach(), "l0": codes.l0(codes.values), "auxk": auxk.detach()}
        loss = nmse + auxk
        if self.multi_topk:
            multi = self.nmse(self.decoded(wide, wide.values), xn_BD) / 8
            parts["multi"] = multi.detach()
            loss = loss + multi
        return StepOutput(loss, parts, codes.of(codes.values), xn_hat_BD.detach())

    def _start_encoder(self, scale: float) -> None:
        super()._start_encoder(scale)
        if not self.tied_init:
            for parameter in (self.W_enc_FD, self.get_parameter("b_enc")):
                parameter.copy_(parameter.roll(1, 0))
