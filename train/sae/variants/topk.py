"""TopK: the k largest of each token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from data.base.config import Flag
from data.base.errors import UserError
from train.sae.config import AuxKConfig
from train.sae.parts.dense import largest_of_each_token
from train.sae.sparse.codes import Codes
from train.sae.sparse.rules import Selection, TopPerToken
from train.sae.step import PLAIN, StepOutput, TrainContext
from train.sae.variants.topk_base import TopKBase


class TopKConfig(AuxKConfig):
    """Settings of TopK."""

    multi_topk: Flag = False
    """Whether the loss adds L(4k) / 8, the NMSE of the reconstruction by the 4k largest."""
    tied_init: Flag = True
    """Whether a latent's encoder starts in its decoder row's direction; false: in another's (GAO's ablation)."""

    @model_validator(mode="after")
    def _wide_enough(self) -> TopKConfig:
        if self.multi_topk and 4 * self.k > self.width:
            raise ValueError(
                f"multi_topk takes 4k={4 * self.k} latents a token from a width of {self.width}: lower k or widen "
                "the SAE"
            )
        return self


class TopK(TopKBase):
    """f = relu of the k largest z of each token; loss = NMSE + AuxK. Gao et al. 2406.04093.

    `multi_topk` adds L(4k) / 8, the NMSE of the reconstruction by the 4k largest; its gradient reaches the encoder.
    """

    name = "topk"
    Config = TopKConfig
    config: TopKConfig

    def dense_encode(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        z_BF = self.pre_activation(xn_BD)
        return torch.where(largest_of_each_token(z_BF, self.config.k), z_BF.relu(), 0.0)

    def dense_loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> Float[Tensor, ""]:
        z_BF = self.pre_activation(xn_BD)
        f_BF = torch.where(largest_of_each_token(z_BF, self.config.k), z_BF.relu(), 0.0)
        target_BE = context.target_of(xn_BD)
        beside = self.beside_latents(xn_BD)
        xn_hat_BD = f_BF @ self.W_dec + beside
        loss = (xn_hat_BD - target_BE).square().sum(1).mean() / self.variance
        if self.config.multi_topk:
            wide_BF = torch.where(largest_of_each_token(z_BF, 4 * self.config.k), z_BF.relu(), 0.0)
            loss = loss + (wide_BF @ self.W_dec + beside - target_BE).square().sum(1).mean() / self.variance / 8
        return loss + self.dense_auxk(z_BF, (target_BE - xn_hat_BD).detach(), context)

    def encode_sparse(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        (codes,) = self.select(xn_BD, self.bias_F, [Selection(TopPerToken(self.config.k))])
        codes = self._of_whole(codes, self.config.k)
        return codes, codes.values

    def _of_whole(self, codes: Codes, k: int) -> Codes:
        """Choose the k largest of each token over all processes of a split dictionary, of those here."""
        return codes if self.split.size == 1 else codes.kept(self.split.top_of_tokens(codes, k))

    def loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> StepOutput:
        k, multi_topk = self.config.k, self.config.multi_topk
        # The k largest are among the 4k largest: one selection serves both reconstructions.
        wide, candidates = self.encode_with_candidates(xn_BD, TopPerToken(4 * k if multi_topk else k), context)
        if multi_topk:
            wide = self._of_whole(wide, 4 * k)
        codes = self._of_whole(wide.top_of_rows(k) if multi_topk else wide, k)
        target_BE = context.target_of(xn_BD)
        found = self.reconstruct(codes, xn_BD, target_BE, candidates)
        auxk = self.auxk(candidates, target_BE, found, context.data)
        metrics = {"nmse": found.nmse.detach(), "l0": self.l0(codes, codes.values), "auxk": auxk.detach()}
        loss = found.term + auxk
        if multi_topk:
            multi = self.reconstruct(wide, xn_BD, target_BE).term / 8
            metrics["multi"] = multi.detach()
            loss = loss + multi
        return StepOutput(loss, metrics, codes.of(codes.values), found.xn_hat_BE.detach())

    def start_encoder(self) -> None:
        if not self.config.tied_init:
            if self.split.size > 1:
                raise UserError(
                    "sae.tied_init=false gives each latent its neighbour's row, which another process has: leave it "
                    "out with trainer.latent_ranks"
                )
            for parameter in (self.W_enc_FD, self.bias_F):
                # Each encoder row (and bias) takes the decoder row of the latent before: directions of the same kind
                # and norm, but of another latent.
                parameter.copy_(parameter.roll(1, 0))
