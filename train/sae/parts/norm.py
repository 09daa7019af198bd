"""Input normalisation: the units an SAE is trained in, and the way back."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.base.errors import UserError

NORM_KINDS = ("none", "dataset", "token")
_EPS = 1e-5  # added to a token's standard deviation, as OA, BatchTopK's code and SAELens' layer_norm do


class InputNorm(nn.Module):
    """x' from x, by `kind`:

    - `none`: x' = x.
    - `dataset`: x' = s x with s = sqrt(D / E||x||^2) over the training tokens, so that E||x'||^2 = D (Bricken et al.,
      April 2024, use
      sqrt(D) / E||x||; Gemma Scope s / sqrt(D)).
    - `token`: x' = (x - mean) / (std + 1e-5) over the D entries of each token, std with ddof 1.

    The buffer `scale` holds s (1 for the other kinds) and is saved with the SAE. Both ways compute in the dtype of
    `scale`.
    """

    scale: Tensor

    def __init__(self, kind: str, d_in: int) -> None:
        super().__init__()
        if kind not in NORM_KINDS:
            raise UserError(f"input_norm={kind!r} is unknown: choose one of {', '.join(NORM_KINDS)}")
        if kind == "token" and d_in < 2:
            raise UserError(
                "input_norm=token divides by the spread over a token's entries and needs a width of at least 2"
            )
        self.kind = kind
        self.d_in = d_in
        self.widths: tuple[int, ...] = (d_in,)  # of the sites, each with a scale of its own; several of a crosscoder
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, *mean_sq_norms: float) -> None:
        """Set s from E||x||^2 (model units), one for each site; nothing for the other kinds."""
        if self.kind == "dataset":
            scales = [(width / mean) ** 0.5 for width, mean in zip(self.widths, mean_sq_norms, strict=True)]
            self.scale.copy_(torch.tensor(scales, dtype=torch.float64).reshape(self.scale.shape))

    def normalise(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Convert model units to x'."""
        # Stores hold bfloat16 or float16; the SAE computes in its own float32.
        x_BD = x_BD.to(self.scale.dtype)
        if self.kind == "dataset":
            return x_BD * self.scale
        if self.kind == "token":
            std_B1, mean_B1 = torch.std_mean(x_BD, dim=1, keepdim=True, correction=1)
            return (x_BD - mean_B1) / (std_B1 + _EPS)
        return x_BD

    def denormalise(self, xn_BD: Float[Tensor, "B D"], x_BD: Float[Tensor, "B _"]) -> Float[Tensor, "B D"]:
        """Convert x' units to model units; `x_BD` is the input (model units) whose mean and spread `token` gives back.

        Of a transcoder, which has no such norm, it is of another width and not read.
        """
        if self.kind == "dataset":
            return xn_BD / self.scale
        if self.kind == "token":
            # Measured again rather than remembered: the input is at hand wherever a token has to be given back its
            # units.
            std_B1, mean_B1 = torch.std_mean(x_BD.to(self.scale.dtype), dim=1, keepdim=True, correction=1)
            return xn_BD * (std_B1 + _EPS) + mean_B1
        return xn_BD
