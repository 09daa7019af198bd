"""Matryoshka: nested prefixes of one BatchTopK dictionary, each reconstructing by itself."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from data.base.config import Real
from train.sae.parts.dense import largest_of_the_batch
from train.sae.sparse.codes import Codes
from train.sae.step import PLAIN, TrainContext
from train.sae.variants.batchtopk import BatchTopKBase, BatchTopKConfig
from train.sae.variants.topk_base import Reconstructed


class MatryoshkaConfig(BatchTopKConfig):
    """Settings of Matryoshka; `k` is a mean over tokens."""

    prefixes: tuple[Real, ...] = (0.03125, 0.09375, 0.21875, 0.46875, 1.0)
    """Shares of the width, increasing, the last 1 (the paper's 2048, 6144, 14336, 30720 and 65536 of 65536)."""

    @property
    def sizes(self) -> list[int]:
        """Compute the prefixes' sizes in latents: a share of p makes ceil(p * F)."""
        return [math.ceil(share * self.width - 1e-9) for share in self.prefixes]

    @model_validator(mode="after")
    def _nested(self) -> MatryoshkaConfig:
        if self.prefixes[-1:] != (1.0,) or any(end <= start for start, end in pairwise([0, *self.sizes])):
            raise ValueError(
                f"prefixes={[*self.prefixes]} of {self.width} latents are {self.sizes}: take increasing shares that "
                "end with 1"
            )
        return self


class Matryoshka(BatchTopKBase):
    """One BatchTopK over the full width; loss = sum over prefixes m of the NMSE of b_dec + f[:m] W_dec[:m], + AuxK.

    Bussmann et al. 2503.17547. AuxK explains the full width's residual. The inference form is that of BatchTopK:
    f = relu(z) 1[z > T].
    """

    name = "matryoshka"
    Config = MatryoshkaConfig
    config: MatryoshkaConfig

    def dense_loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> Float[Tensor, ""]:
        z_BF = self.pre_activation(xn_BD)
        f_BF = torch.where(largest_of_the_batch(z_BF, self.config.k * len(xn_BD)), z_BF.relu(), 0.0)
        loss = xn_BD.new_zeros(())
        target_BE, beside = context.target_of(xn_BD), self.beside_latents(xn_BD)
        xn_hat_BD = target_BE
        for m in self.config.sizes:
            xn_hat_BD = f_BF[:, :m] @ self.W_dec[:m] + beside
            loss = loss + (xn_hat_BD - target_BE).square().sum(1).mean() / self.variance
        return loss + self.dense_auxk(z_BF, (target_BE - xn_hat_BD).detach(), context)

    @property
    def prefix_sizes(self) -> list[int]:
        return [self.split.own(m) for m in self.config.sizes]

    def reconstruct_plainly(
        self, codes: Codes, xn_BD: Float[Tensor, "B D"], target_BE: Float[Tensor, "B E"]
    ) -> Reconstructed:
        decoded_PBD = codes.decode(codes.values, self.W_dec, self.prefix_sizes)
        xn_hat_PBD = self.split.total(decoded_PBD) + self.beside_latents(xn_BD)
        nmse_P = (xn_hat_PBD - target_BE).square().sum((1, 2)) / (len(xn_BD) * self.variance)
        return Reconstructed(nmse_P.sum(), nmse_P[-1], xn_hat_PBD[-1])
