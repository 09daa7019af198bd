"""The encoder's product z = xc W^T + bias, in blocks of latents, so that z is never whole in memory.

Letters: B tokens in a batch, D model width, F latents, c latents of a block, d chosen latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.base.cpu import has_bf16_units


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
        if out is None:
            out = self.xc_BD.new_empty(self.rows, len(W_cD))
        if self.matmul != "bf16":
            return _into(out, self.xc_BD, W_cD, bias_c)
        if out.dtype == torch.float32 and out.device.type == "cpu" and has_bf16_units():
            with bf16_products():
                return _into(out, self.xc_BD, W_cD, bias_c)
        xc_BD, W_cD = self.xc_BD.bfloat16(), W_cD.bfloat16()
        if not out.is_cuda:  # no units for it: the same rounding, and a product in the dtype of z
            return _into(out, xc_BD.to(out.dtype), W_cD.to(out.dtype), bias_c)
        torch.mm(xc_BD, W_cD.t(), out_dtype=out.dtype, out=out)  # a GPU sums bfloat16 factors in float32 by itself
        # Not by addmm: with float32 out of bfloat16 factors it writes the bias into z first, and reads that again.
        return out if bias_c is None else out.add_(bias_c)


def _into(out: Tensor, xc_BD: Tensor, W_cD: Tensor, bias_c: Tensor | None) -> Tensor:
    if bias_c is None:
        return torch.mm(xc_BD, W_cD.t(), out=out)
    return torch.addmm(bias_c, xc_BD, W_cD.t(), out=out)


@cache
@contextmanager
def bf16_products() -> Iterator[None]:
    """Let oneDNN round the factors of float32 products on a CPU to bfloat16 for a while; it sums in float32.

    A product too small to gain from it may stay in float32.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def float32_products() -> Iterator[None]:
    """Compute products on a GPU in float32 for a while, where training has tf32: what is measured has no rounding."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
