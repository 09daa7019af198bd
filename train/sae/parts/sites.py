"""What a crosscoder has by site: one dictionary over several sites, whose activations lie side by side in one row.

Letters: B tokens, D entries of all sites together, D_s those of one site, F latents, S sites.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from data.base.errors import UserError
from train.sae.parts.norm import InputNorm


class SiteNorms(InputNorm):
    """x' = [x'_1 | ... | x'_S]: each site normalised apart, as a plain SAE of that site would.

    The buffer `scale` [S] has s of each site. So each site has E||x'_s||^2 = D_s, and none outweighs the others by the
    size of its activations alone.
    """

    def __init__(self, kind: str, widths: Sequence[int]) -> None:
        super().__init__(kind, sum(widths))
        if kind == "token" and min(widths) < 2:
            raise UserError("input_norm=token divides by the spread over a token's entries: each site needs at least 2")
        self.widths = tuple(widths)
        self.register_buffer("scale", torch.ones(len(self.widths)))

    def _scale_D(self) -> Float[Tensor, " D"]:
        return torch.cat([s.expand(width) for s, width in zip(self.scale, self.widths, strict=True)])

    def weighed(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Multiply each site by its s, nothing else: a squared error then weighs the sites as the loss does."""
        return x_BD * self._scale_D()

    def normalise(self, x_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Convert model units to x'."""
        x_BD = x_BD.to(self.scale.dtype)
        if self.kind == "dataset":
            return x_BD * self._scale_D()
        return torch.cat([InputNorm.normalise(self, part) for part in torch.split(x_BD, list(self.widths), 1)], 1)

    def denormalise(self, xn_BD: Float[Tensor, "B D"], x_BD: Float[Tensor, "B _"]) -> Float[Tensor, "B D"]:
        """Convert x' units to model units; `x_BD` is the input (model units) whose mean and spread `token` gives back,
        to each site its own."""
        if self.kind == "dataset":
            return xn_BD / self._scale_D()
        pairs = zip(torch.split(xn_BD, list(self.widths), 1), torch.split(x_BD, list(self.widths), 1), strict=True)
        return torch.cat([InputNorm.denormalise(self, xn, x) for xn, x in pairs], 1)


def norms_by_site(W_dec_FD: Float[Tensor, "F D"], widths: Sequence[int]) -> Float[Tensor, "S F"]:
    """Compute the length of each latent's decoder row at each site; differentiable."""
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in torch.split(W_dec_FD, list(widths), 1)])


def checked_widths(widths: Sequence[int], d_in: int, d_out: int | None) -> tuple[int, ...]:
    """Check the widths of a crosscoder's sites; raises UserError where they do not make up its input."""
    if d_out is not None:
        raise UserError("a crosscoder reconstructs all its sites and has no target: leave target out, or name one site")
    if not widths or min(widths) < 1 or sum(widths) != d_in:
        raise UserError(f"site_widths={[*widths]} do not make up the {d_in} entries that a crosscoder reads")
    return tuple(widths)
