"""The encoder's product where few of its entries matter: z in blocks of latents, of which a selector keeps some.

Letters: B tokens in a batch, D model width, F latents, n entries, d dead latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from train.sae.sparse import fixed
from train.sae.sparse.codes import Decode, Support
from train.sae.sparse.fixed import FixedDecode, FixedSupport
from train.sae.sparse.select import Above, Entries, Selector, TopOfBatch, TopPerToken, top_of_rows

_BLOCK = {"cpu": 1 << 24}  # entries of z held at a time: 64 MiB, as large as a product needs to run at full speed
_BLOCK_ELSEWHERE = 1 << 27
_DENSE = 0.15  # share of active entries above which the dense products are the faster ones


class Codes:
    """The z that matter to a step: those of the entries in `support`, [n], or all, [B, F], where `support` is None.

    What a variant writes in terms of `values`, `at`, `decode` and `fired` holds in both forms.
    """

    def __init__(self, values: Tensor, support: Support | None, shape: tuple[int, int]) -> None:
        self.values, self.support, self.shape = values, support, shape

    def of(self, f: Tensor) -> Codes:
        """The same places with f for z, detached."""
        return Codes(f.detach(), self.support, self.shape)

    def at(self, of_F: Shaped[Tensor, " F"]) -> Tensor:
        """A vector over latents, for use beside z."""
        return of_F if self.support is None else of_F.index_select(0, self.support.latents_n)

    def decode(
        self, f: Tensor, W_dec_FD: Float[Tensor, "F D"], bounds: Sequence[int] | None = None
    ) -> Float[Tensor, "P B D"]:
        """f[:, :bound] W_dec[:bound] for each of the `bounds` (increasing, the last F; None: F alone)."""
        bounds = [self.shape[1]] if bounds is None else list(bounds)
        if self.support is not None:
            function = FixedDecode if isinstance(self.support, FixedSupport) else Decode
            x_hat_PBD: Tensor = function.apply(f, W_dec_FD, self.support, bounds)  # type: ignore[no-untyped-call]
            return x_hat_PBD
        starts = [0, *bounds[:-1]]
        parts = [f[:, start:end] @ W_dec_FD[start:end] for start, end in zip(starts, bounds, strict=True)]
        return torch.stack(parts).cumsum(0)

    def fired(self, f: Tensor) -> Bool[Tensor, " F"]:
        """Latents with f above zero on any token."""
        return f.amax(0) > 0 if self.support is None else self.support.fired(f)

    def l0(self, f: Tensor) -> Float[Tensor, ""]:
        """Mean number of f above zero a token."""
        return (f.detach() > 0).sum() / self.shape[0]

    def top_of_rows(self, k: int) -> Codes:
        """The k largest of each token, of entries."""
        assert self.support is not None
        entries = Entries(self.support.rows_n, self.support.latents_n, self.values.detach())
        if isinstance(self.support, FixedSupport):
            index_m = fixed.top_of_rows(entries.values_n, k, self.shape[0])
        else:
            index_m = top_of_rows(entries, k, self.shape[0]).nonzero().squeeze(1)
        support = type(self.support)(entries.rows_n[index_m], entries.latents_n[index_m], self.shape)
        return Codes(self.values.index_select(0, index_m), support, self.shape)

    def totals(self, f: Tensor) -> Float[Tensor, " F"]:
        """The sum of f over tokens."""
        if self.support is None:
            return f.sum(0)
        return f.new_zeros(self.shape[1]).index_add(0, self.support.latents_n, f)

    def dense(self, f: Tensor) -> Float[Tensor, "B F"]:
        """f as a matrix."""
        return f if self.support is None else self.support.dense(f)


def _product(
    xc_BD: Tensor, W_cD: Tensor, bias_c: Tensor | None, matmul: str, out: Float[Tensor, "B c"] | None = None
) -> Float[Tensor, "B c"]:
    """xc W^T + bias; with matmul `bf16` of both rounded to bfloat16, its terms summed in float32."""
    if out is None:
        out = xc_BD.new_empty(len(xc_BD), len(W_cD))
    if matmul == "bf16":
        xc_BD, W_cD = xc_BD.bfloat16(), W_cD.bfloat16()
        if out.is_cuda:
            if bias_c is None:
                return torch.mm(xc_BD, W_cD.t(), out_dtype=out.dtype, out=out)
            return torch.addmm(bias_c, xc_BD, W_cD.t(), out_dtype=out.dtype, out=out)
        xc_BD, W_cD = xc_BD.to(out.dtype), W_cD.to(out.dtype)
    if bias_c is None:
        return torch.mm(xc_BD, W_cD.t(), out=out)
    return torch.addmm(bias_c, xc_BD, W_cD.t(), out=out)


def _block_width(rows: int, width: int, device: torch.device) -> int:
    """Latents of a block: a multiple of 32, or all."""
    wanted = _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // max(1, rows) // 32 * 32
    return min(width, max(32, wanted))


class _Aside:
    """Some latents' z on the side, while the blocks pass by: whole, or what a selector keeps of them.

    Latents count from 0 to d - 1 here.
    """

    def __init__(self, latents_d: Tensor, selector: Selector | None, firsts: range, width: int) -> None:
        self.latents_d, self.selector = latents_d, selector
        self.ends = torch.searchsorted(latents_d, latents_d.new_tensor([*firsts, width])).tolist()
        self.parts: list[Tensor] = []

    def feed(self, z_Bc: Tensor, first: int, block: int) -> None:
        start, end = self.ends[block], self.ends[block + 1]
        z_Bd = z_Bc.index_select(1, self.latents_d[start:end] - first)
        if self.selector is None:
            self.parts.append(z_Bd)
        elif end > start:
            self.selector.feed(z_Bd, start)

    def finish(self, rows: int) -> tuple[Tensor, Support | None]:
        if self.selector is None:
            return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, 1), None
        entries = self.selector.finish()
        return entries.values_n, Support(entries.rows_n, entries.latents_n, (rows, len(self.latents_d)))


def _choose(
    xc_BD: Tensor,
    W_enc_FD: Tensor,
    bias_F: Tensor | None,
    selector: Selector,
    aside: _Aside | None,
    firsts: range,
    matmul: str,
) -> tuple[Tensor, Support | None]:
    """Values and where they stand; all of z and None where `Above` finds too many active entries."""
    (rows, width), block = (len(xc_BD), len(W_enc_FD)), firsts.step
    memory, whole_BF = xc_BD.new_empty(rows * block), None
    for i, first in enumerate(firsts):
        last = min(first + block, width)
        z_Bc = memory[: rows * (last - first)].view(rows, -1) if whole_BF is None else whole_BF[:, first:last]
        _product(xc_BD, W_enc_FD[first:last], None if bias_F is None else bias_F[first:last], matmul, z_Bc)
        if aside is not None:
            aside.feed(z_Bc, first, i)
        if whole_BF is None:
            selector.feed(z_Bc, first)
            if not first and isinstance(selector, Above) and selector.count > _DENSE * z_Bc.numel():
                whole_BF = z_Bc if last == width else xc_BD.new_empty(rows, width)
                whole_BF[:, :last] = z_Bc
    if whole_BF is not None:
        return whole_BF, None
    entries = selector.finish()
    return entries.values_n, Support(entries.rows_n, entries.latents_n, (rows, width))


def _choose_fixed(
    xc_BD: Tensor, W_enc_FD: Tensor, bias_F: Tensor | None, selector: Selector, firsts: range, matmul: str
) -> tuple[Tensor, Support | None]:
    """The same by sizes known beforehand. What `Above` keeps has none, so it gets all of z."""
    rows, width = len(xc_BD), len(W_enc_FD)
    if not isinstance(selector, TopOfBatch | TopPerToken):
        return _product(xc_BD, W_enc_FD, bias_F, matmul), None
    memory = xc_BD.new_empty(rows * firsts.step)

    def z_of(first: int, last: int) -> Tensor:
        z_Bc = memory[: rows * (last - first)].view(rows, -1)
        return _product(xc_BD, W_enc_FD[first:last], None if bias_F is None else bias_F[first:last], matmul, z_Bc)

    entries = fixed.choose(selector, firsts, z_of, width)
    return entries.values_n, FixedSupport(entries.rows_n, entries.latents_n, (rows, width))


def _choose_aside_fixed(
    xc_BD: Tensor,
    W_enc_FD: Tensor,
    bias_F: Tensor | None,
    selector: Selector | None,
    aside_d: Tensor,
    live_d: Tensor | None,
    matmul: str,
) -> tuple[Tensor, Support | None]:
    """Latents aside by a product of their own. Where a selector takes a live one, fewer are dead than it wants."""
    rows, width = len(xc_BD), len(aside_d)
    bias_d = None if bias_F is None else bias_F.index_select(0, aside_d)
    z_Bd = _product(xc_BD, W_enc_FD.index_select(0, aside_d), bias_d, matmul)
    if selector is None:
        return z_Bd, None
    assert isinstance(selector, TopOfBatch | TopPerToken)
    if live_d is not None:
        z_Bd.masked_fill_(live_d, -torch.inf)
    entries = fixed.choose(selector, [0], lambda first, last: z_Bd, width)
    return entries.values_n, FixedSupport(entries.rows_n, entries.latents_n, (rows, width))


class _Encode(torch.autograd.Function):
    """z = (x' - b_dec) W_enc + bias at places found beforehand; its gradients touch only those."""

    @staticmethod
    def forward(
        ctx: Any,
        xn_BD: Tensor,
        W_enc_FD: Tensor,
        bias_F: Tensor | None,
        b_dec_D: Tensor | None,
        xc_BD: Tensor,
        found: tuple[Tensor, Support | None],
        beside: tuple[Tensor, Support | None] | None,
        aside_d: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.support, ctx.aside_support = found[1], beside and beside[1]
        ctx.save_for_backward(xc_BD, W_enc_FD, aside_d)
        ctx.set_materialize_grads(False)
        return found[0], beside and beside[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_aside: Tensor | None) -> tuple[Tensor | None, ...]:
        xc_BD, W_enc_FD, aside_d = ctx.saved_tensors
        grad_x = torch.zeros_like(xc_BD) if ctx.needs_input_grad[0] else None
        if grad is None:
            grad_FD, totals_F = torch.zeros_like(W_enc_FD), W_enc_FD.new_zeros(len(W_enc_FD))
        else:
            grad_FD, totals_F = _weight_gradient(grad, ctx.support, xc_BD)
            if grad_x is not None:
                grad_x += _input_gradient(grad, ctx.support, W_enc_FD)
        if grad_aside is not None:
            grad_dD, totals_d = _weight_gradient(grad_aside, ctx.aside_support, xc_BD)
            grad_FD.index_add_(0, aside_d, grad_dD)
            totals_F.index_add_(0, aside_d, totals_d)
            if grad_x is not None:
                grad_x += _input_gradient(grad_aside, ctx.aside_support, W_enc_FD[aside_d])
        grad_bias = totals_F if ctx.needs_input_grad[2] else None
        grad_b_dec = -(totals_F @ W_enc_FD) if ctx.needs_input_grad[3] else None
        return grad_x, grad_FD, grad_bias, grad_b_dec, None, None, None, None


def _weight_gradient(grad: Tensor, support: Support | None, xc_BD: Tensor) -> tuple[Tensor, Tensor]:
    """grad^T @ xc and the latents' sums of grad."""
    if support is None:
        return grad.t() @ xc_BD, grad.sum(0)
    return support.latent_sums(grad, xc_BD), support.latent_totals(grad)


def _input_gradient(grad: Tensor, support: Support | None, W_FD: Tensor) -> Tensor:
    return grad @ W_FD if support is None else support.row_sums(grad, W_FD)


def encode(
    xn_BD: Float[Tensor, "B D"],
    W_enc_FD: Float[Tensor, "F D"],
    bias_F: Float[Tensor, " F"] | None,
    b_dec_D: Float[Tensor, " D"] | None,
    selector: Selector,
    aside_d: Int[Tensor, " d"] | None = None,
    aside_selector: Selector | None = None,
    aside_live_d: Bool[Tensor, " d"] | None = None,
    *,
    matmul: str = "float32",
) -> tuple[Codes, Codes | None]:
    """What `selector` keeps of z = (x' - b_dec) W_enc + bias; and of the latents `aside_d` (ascending), on the side.

    None of bias and b_dec stand for zero. z is never whole in memory, but where `Above` keeps so many entries that
    dense products are faster: then all of it comes back. Of the latents aside, counted from 0 to d - 1, all of z
    comes back, or what `aside_selector` keeps, which prefers those that are not `aside_live_d`. Differentiable; a
    selection passes no gradient. `matmul` bf16 rounds the product's factors to bfloat16, and nothing else.
    On a GPU selections have the size asked for, filled up with zeros, and `Above` gets all of z.
    """
    rows, width = len(xn_BD), len(W_enc_FD)
    firsts = range(0, width, _block_width(rows, width, xn_BD.device))
    beside: tuple[Tensor, Support | None] | None = None
    with torch.no_grad():
        xc_BD = xn_BD if b_dec_D is None else xn_BD - b_dec_D
        if fixed.wanted(xn_BD):
            weights = xc_BD, W_enc_FD, bias_F
            found = _choose_fixed(*weights, selector, firsts, matmul)
            if aside_d is not None:
                beside = _choose_aside_fixed(*weights, aside_selector, aside_d, aside_live_d, matmul)
        else:
            aside = None if aside_d is None else _Aside(aside_d, aside_selector, firsts, width)
            found = _choose(xc_BD, W_enc_FD, bias_F, selector, aside, firsts, matmul)
            if aside is not None:
                beside = aside.finish(rows)
    z, z_aside = _Encode.apply(xn_BD, W_enc_FD, bias_F, b_dec_D, xc_BD, found, beside, aside_d)  # type: ignore[no-untyped-call]
    if isinstance(found[1], FixedSupport) and isinstance(selector, TopOfBatch | TopPerToken) and selector.positive:
        z = z.relu()  # what fills the selection up is 0 and takes no gradient
    codes = Codes(z, found[1], (rows, width))
    return codes, None if beside is None or aside_d is None else Codes(z_aside, beside[1], (rows, len(aside_d)))
