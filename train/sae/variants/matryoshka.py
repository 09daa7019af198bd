"""Matryoshka: nested prefixes of one BatchTopK dictionary, each reconstructing by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from data.base.errors import UserError
from train.sae.sparse.encode import Codes
from train.sae.variants.batchtopk import BatchTopKBase

# The paper's 2048, 6144, 14336, 30720 and 65536 latents of 65536.
_PREFIXES = (0.03125, 0.09375, 0.21875, 0.46875, 1.0)


class Matryoshka(BatchTopKBase):
    """One BatchTopK over the full width; loss = sum over prefixes m of the NMSE of b_dec + f[:m] W_dec[:m], + AuxK.

    Bussmann et al. 2503.17547. AuxK explains the full width's residual. `prefixes` are shares of the width, increasing,
    the last 1; a share of p makes ceil(p * F) latents. When it ships it is a BatchTopK: f = relu(z) 1[z > T].
    """

    name = "matryoshka"

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        k: int,
        prefixes: Sequence[float] = _PREFIXES,
        input_norm: str = "dataset",
        apply_b_dec_to_input: bool = True,
        auxk_alpha: float = 1 / 32,
        auxk_relu: bool = False,
        auxk_norm: str = "variance",
        auxk_k: int | None = None,
        auxk_over: str = "token",
        selection: str = "batch",
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
            selection=selection,
        )
        self.prefixes = [float(share) for share in prefixes]
        self.sizes = [math.ceil(share * width - 1e-9) for share in self.prefixes]
        if self.prefixes[-1:] != [1.0] or any(end <= start for start, end in pairwise([0, *self.sizes])):
            raise UserError(
                f"prefixes={self.prefixes} of {width} latents are {self.sizes}: take increasing shares that end with 1"
            )

    def reconstruct(
        self, codes: Codes, f: Tensor, xn_BD: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "B D"]]:
        xn_hat_PBD = codes.decode(f, self.W_dec, self.sizes) + self.b_dec
        nmse_P = (xn_hat_PBD - xn_BD).square().sum((1, 2)) / (len(xn_BD) * self.variance)
        return nmse_P.sum(), nmse_P[-1], xn_hat_PBD[-1]
