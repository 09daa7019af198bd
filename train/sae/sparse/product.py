"""The encoder's product z = xc W^T + bias, in blocks of latents, so that z is never whole in memory.

Letters: B tokens in a batch, D model width, F latents, c latents of a block, d chosen latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Product:
    """What z is made of."""

    xc_BD: Float[Tensor, "B D"]
    """x' - b_dec, or x' where nothing is subtracted."""
    W_enc_FD: Float[Tensor, "F D"]
    """The encoder's weights, latent by latent."""
    bias_F: Float[Tensor, " F"] | None
    """The latents' biases; None stands for zero."""
    matmul: str = "float32"
    """`bf16`: both factors rounded to bfloat16, the terms summed in float32."""

    @property
    def rows(self) -> int:
        """Return the number of tokens."""
        return len(self.xc_BD)

    @property
    def width(self) -> int:
        """Return the number of latents."""
        return len(self.W_enc_FD)

    def blocks(self, entries: int) -> range:
        """Return the first latents of blocks of about so many entries of z: a multiple of 32 latents each, or all."""
        # A multiple of 32 keeps the groups of the selections whole, and matrix kernels at full width.
        latents = entries // max(1, self.rows) // 32 * 32
        return range(0, self.width, min(self.width, max(32, latents)))

    def block(self, first: int, last: int, out: Float[Tensor, "B c"] | None = None) -> Float[Tensor, "B c"]:
        """Compute z of the latents from `first` to before `last`."""
        bias_c = None if self.bias_F is None else self.bias_F[first:last]
        return self._product(self.W_enc_FD[first:last], bias_c, out)

    def of(self, latents_d: Int[Tensor, " d"]) -> Float[Tensor, "B d"]:
        """Compute z of these latents by a product of their own."""
        bias_d = None if self.bias_F is None else self.bias_F.index_select(0, latents_d)
        return self._product(self.W_enc_FD.index_select(0, latents_d), bias_d, None)

    def _product(self, W_cD: Tensor, bias_c: Tensor | None, out: Tensor | None) -> Tensor:
        xc_BD = self.xc_BD
        if out is None:
            out = xc_BD.new_empty(len(xc_BD), len(W_cD))
        if self.matmul == "bf16":
            xc_BD, W_cD = xc_BD.bfloat16(), W_cD.bfloat16()
            if out.is_cuda:  # a GPU sums bfloat16 factors in float32 by itself
                if bias_c is None:
                    return torch.mm(xc_BD, W_cD.t(), out_dtype=out.dtype, out=out)
                return torch.addmm(bias_c, xc_BD, W_cD.t(), out_dtype=out.dtype, out=out)
            # A CPU would round the sums to bfloat16 too; widened again, the factors are rounded and the sums are not.
            xc_BD, W_cD = xc_BD.to(out.dtype), W_cD.to(out.dtype)
        if bias_c is None:
            return torch.mm(xc_BD, W_cD.t(), out=out)
        return torch.addmm(bias_c, xc_BD, W_cD.t(), out=out)
