"""What no step can do without, timed beside the contestants, and what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from benchmarks.contestants.spec import LR, Contestant, Spec

_ADAM_BYTES = 28  # an entry: parameter, gradient and both moments read, all but the gradient written, in float32


class SparseFloor:
    """The encoder's dense product, the sparse work of the active latents, one fused Adam pass over W_enc and W_dec.

    The sparse work: decode, and the gradients of both matrices, each a gather of activity * B rows of D.
    """

    def __init__(self, spec: Spec) -> None:
        kept, device = round(spec.activity * spec.batch), spec.device
        shape = (spec.width, spec.d_model)
        self.spec = spec
        self.W_enc_FD, self.W_dec_FD = (torch.randn(shape, device=device).requires_grad_() for _ in range(2))
        self.optimizer = torch.optim.Adam([self.W_enc_FD, self.W_dec_FD], lr=LR, fused=True)
        self.W_enc_FD.grad, self.W_dec_FD.grad = (torch.randn(shape, device=device) * 1e-3 for _ in range(2))
        self.z_BF = torch.empty(spec.batch, spec.width, device=device)
        self.latents = torch.randint(spec.width, (kept,), device=device)
        self.rows = torch.randint(spec.batch, (kept,), device=device)
        self.by_row = torch.linspace(0, kept, spec.batch + 1, device=device).long()
        self.by_latent = torch.linspace(0, kept, spec.width + 1, device=device).long()
        self.values = torch.randn(kept, device=device)

    def _gather(self, table: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
        return embedding_bag(
            index, table, offsets, mode="sum", per_sample_weights=self.values, include_last_offset=True
        )

    def step(self, x_BD: Tensor) -> None:
        with torch.no_grad():
            with self.spec.autocast():
                if self.spec.precision == "bf16":
                    self.z_BF = x_BD @ self.W_enc_FD.t()
                else:
                    torch.mm(x_BD, self.W_enc_FD.t(), out=self.z_BF)
            error_BD = self._gather(self.W_dec_FD, self.latents, self.by_row)
            self._gather(error_BD, self.rows, self.by_latent)
            self._gather(x_BD, self.rows, self.by_latent)
        self.optimizer.step()

    def facts(self, x_BD: Tensor) -> dict[str, float]:
        return {"l0": len(self.latents) / self.spec.batch, "dead": 0.0, "auxk": 0.0, **roofline(self.spec, x_BD)}


class DenseProducts:
    """The five products of a dense step and nothing else."""

    def __init__(self, spec: Spec) -> None:
        batch, d, width, device = spec.batch, spec.d_model, spec.width, spec.device
        self.spec = spec
        self.W_DF, self.W_FD = torch.randn(d, width, device=device), torch.randn(width, d, device=device)
        self.f_BF, self.out_BF = torch.randn(batch, width, device=device), torch.empty(batch, width, device=device)
        self.out_BD, self.e_BD = torch.empty(batch, d, device=device), torch.randn(batch, d, device=device)
        self.out_FD, self.out_DF = torch.empty_like(self.W_FD), torch.empty_like(self.W_DF)

    def step(self, x_BD: Tensor) -> None:
        pairs = [
            (x_BD, self.W_DF, self.out_BF),
            (self.f_BF, self.W_FD, self.out_BD),
            (self.f_BF.t(), self.e_BD, self.out_FD),
            (self.e_BD, self.W_FD.t(), self.out_BF),
            (x_BD.t(), self.f_BF, self.out_DF),
        ]
        with self.spec.autocast():
            for left, right, out in pairs:
                if self.spec.precision == "bf16":
                    left @ right
                else:
                    torch.mm(left, right, out=out)

    def facts(self, x_BD: Tensor) -> dict[str, float]:
        return {"l0": float(self.spec.width), "dead": 0.0, "auxk": 0.0}


def _best(run: Callable[[], object], device: str) -> float:
    """Return the least seconds of five runs."""
    seconds = []
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def roofline(spec: Spec, x_BD: Tensor) -> dict[str, float]:
    """Return the machine's rates, and what they make of the encoder's product and Adam's bytes.

    tflops: of a product of the encoder's shape at the precision asked for; gb_s: of a copy, read and written.
    """
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    W_DF = torch.randn(spec.d_model, spec.width, device=spec.device, dtype=dtype)
    x_BD = x_BD.to(dtype)
    out_BF = torch.empty(len(x_BD), spec.width, device=spec.device, dtype=dtype)
    product = _best(lambda: torch.mm(x_BD, W_DF, out=out_BF), spec.device)
    operations = 2 * len(x_BD) * spec.d_model * spec.width
    source = torch.ones(2**26, device=spec.device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), spec.device)
    adam = _ADAM_BYTES * 2 * spec.d_model * spec.width / bandwidth
    return {"tflops": operations / product / 1e12, "gb_s": bandwidth / 1e9, "roofline_ms": (product + adam) * 1e3}


def make(name: str, spec: Spec, sample_BD: Tensor) -> Contestant:
    return SparseFloor(spec) if name == "sparse-floor" else DenseProducts(spec)
