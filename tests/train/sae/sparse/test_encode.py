"""The sparse encoder and decoder against dense autograd in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.toy import activations, make, train
from train.sae.sparse.backend import use_backend
from train.sae.sparse.codes import Codes, Support
from train.sae.sparse.cpu import CPUBackend, select
from train.sae.sparse.encode import encode
from train.sae.sparse.product import Product, float32_products
from train.sae.sparse.rules import Above, Everything, Rule, Selection, TopOfBatch, TopPerToken

B, D, F = 12, 5, 96
DEAD = torch.tensor([3, 7, 31, 32, 40, 64, 95])
RULES: dict[str, Rule] = {
    "topk": TopPerToken(3),
    "batchtopk": TopOfBatch(3 * B),
    "above": Above(torch.tensor(1.5, dtype=torch.float64)),
    "above each": Above(torch.linspace(1, 2, F, dtype=torch.float64)),
}


@pytest.fixture(params=[1 << 24, B * 32, B * 70], ids=["one block", "three blocks", "two uneven blocks"])
def blocks(request: pytest.FixtureRequest) -> int:
    """Entries of z at a time."""
    return int(request.param)


@pytest.fixture(params=[False, True], ids=["sparse", "dense"])
def dense(request: pytest.FixtureRequest, blocks: int) -> Iterator[bool]:
    """Whether `Above` finds too many active entries."""
    with use_backend(CPUBackend(block_entries=blocks, dense_share=0.0 if request.param else 1.0)):
        yield bool(request.param)


def weights(seed: int = 0) -> list[Tensor]:
    """x, W_enc [F, D], bias, b_dec, W_dec [F, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, D), (F, D), (F,), (D,), (F, D)]
    x, W, bias, b_dec, W_dec = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [part.requires_grad_() for part in (x, W, bias, b_dec, W_dec)]


def plain(codes: Codes, x: Tensor, W_enc: Tensor, bias: Tensor, b_dec: Tensor) -> Tensor:
    """Dense z, zero where the codes keep nothing."""
    z = (x - b_dec) @ W_enc.t() + bias
    kept = torch.ones_like(z) if codes.support is None else codes.support.dense(torch.ones_like(codes.values))
    return z * kept.detach()


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("aside", [None, "held", "selected"])
def test_values_and_every_gradient_are_those_of_the_dense_formula(name: str, aside: str | None, dense: bool) -> None:
    x, W_enc, bias, b_dec, W_dec = parts = weights()
    selections = [Selection(RULES[name])]
    if aside is not None:
        selections.append(Selection(TopPerToken(2, positive=False) if aside == "selected" else Everything(), DEAD))
    codes, *others = encode(x, W_enc, bias, b_dec, selections)
    assert (codes.support is None) == (dense and name.startswith("above"))
    assert codes.shape == (B, F)
    loss = (codes.decode(codes.values.sin(), W_dec)[0] ** 2).sum() + codes.totals(codes.values).square().sum()
    z = plain(codes, x, W_enc, bias, b_dec)
    wanted = ((z.sin() @ W_dec) ** 2).sum() + z.sum(0).square().sum()
    for beside in others:
        loss = loss + (beside.decode(beside.values.cos(), W_dec[DEAD])[0] ** 2).sum()
        z_Bd = ((x - b_dec) @ W_enc.t() + bias)[:, DEAD]
        kept = torch.ones_like(z_Bd, dtype=torch.bool)
        if aside == "selected":
            kept = torch.zeros_like(kept).scatter_(1, z_Bd.topk(2, dim=1).indices, True)
        wanted = wanted + (torch.where(kept, z_Bd.cos(), 0.0) @ W_dec[DEAD]).square().sum()
    torch.testing.assert_close(loss, wanted)
    found = torch.autograd.grad(loss, parts)
    for one, other in zip(found, torch.autograd.grad(wanted, parts), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", RULES)
def test_gradients_equal_finite_differences(name: str, dense: bool) -> None:
    """The kept places do not move under a step of 1e-6."""

    def of_all(x: Tensor, W_enc: Tensor, bias: Tensor, b_dec: Tensor, W_dec: Tensor) -> Tensor:
        codes, beside = encode(x, W_enc, bias, b_dec, [Selection(RULES[name]), Selection(Everything(), DEAD)])
        x_hat_PBD = codes.decode(codes.values, W_dec, [10, 11, F])
        return torch.cat([x_hat_PBD.flatten(0, 1), beside.values @ W_dec[DEAD]])

    assert torch.autograd.gradcheck(of_all, weights(3), fast_mode=True)


def test_without_bias_and_b_dec() -> None:
    x, W_enc, _, _, _ = weights()
    (codes,) = encode(x, W_enc, None, None, [Selection(TopPerToken(4))])
    assert torch.allclose(codes.dense(codes.values), torch.where(codes.dense(codes.values) > 0, x @ W_enc.t(), 0.0))
    codes.values.sum().backward()
    assert x.grad is not None and W_enc.grad is not None


@pytest.mark.parametrize("name", RULES)
def test_bf16_rounds_the_products_factors_and_nothing_else(name: str, dense: bool) -> None:
    """The same places and values as a product of rounded factors; gradients as of factors that are not."""
    x, W_enc, bias, b_dec, W_dec = parts = weights(4)
    selections = [Selection(RULES[name]), Selection(Everything(), DEAD)]
    codes, beside = encode(x, W_enc, bias, b_dec, selections, matmul="bf16")
    rounded = (x - b_dec).bfloat16().double() @ W_enc.bfloat16().double().t() + bias
    torch.testing.assert_close(beside.values, rounded[:, DEAD], rtol=1e-12, atol=1e-12)
    exact = select(RULES[name], rounded.detach())
    if codes.support is None:
        torch.testing.assert_close(codes.values, rounded, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(codes.support.rows_n, exact.rows_n)
        assert torch.equal(codes.support.latents_n, exact.latents_n)
        torch.testing.assert_close(codes.values, exact.values_n, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(rounded, (x - b_dec) @ W_enc.t() + bias, atol=1e-4)
    found = torch.autograd.grad(codes.decode(codes.values.detach(), W_dec).sum() + codes.values.sum(), parts)
    z = plain(codes, x, W_enc, bias, b_dec)
    f = codes.dense(codes.values.detach())
    for one, other in zip(found, torch.autograd.grad((f @ W_dec).sum() + z.sum(), parts), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("with_bias", [False, True])
def test_bf16_of_float32_is_the_product_of_rounded_factors_summed_in_float32(with_bias: bool) -> None:
    """By the CPU's own units where it has them, also into a part of a larger z; the process's setting stays."""
    generator = torch.Generator().manual_seed(0)
    x, W, bias = (torch.randn(*shape, generator=generator) for shape in ((256, 192), (512, 192), (512,)))
    z = torch.zeros(256, 1024)
    before = torch.backends.mkldnn.matmul.fp32_precision
    Product(x, W, bias if with_bias else None, "bf16").block(0, 512, z[:, 256:768])
    wanted = x.bfloat16().double() @ W.bfloat16().double().t() + (bias if with_bias else 0)
    torch.testing.assert_close(z[:, 256:768].double(), wanted, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(x @ W.t(), wanted.float(), atol=1e-2)  # a product of float32 is not rounded after it
    assert not z[:, :256].any() and not z[:, 768:].any()
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_products_are_float32_for_a_while_and_then_as_before() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(KeyError), float32_products():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_only_training_rounds() -> None:
    sae, xn = make("topk").double(), activations(4).double()  # in float32 a CPU may not round so small a product
    before = sae.encode_normalised(xn)
    sae.matmul = "bf16"
    assert not torch.equal(sae.encode_normalised(xn), before)
    assert torch.equal(sae.eval().encode_normalised(xn), before)


class Operations(TorchDispatchMode):
    """Writes down which of torch's operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bounds", [[F], [10, 60, F]])
def test_a_dense_decode_takes_no_cumulative_sum_and_no_slice_of_all(bounds: list[int]) -> None:
    """A GPU that is to be deterministic refuses the one; the other costs a second gradient as large as W_dec."""
    f, W_dec = torch.rand(B, F).requires_grad_(), torch.rand(F, D).requires_grad_()
    with Operations() as operations:
        Codes(f, None, (B, F)).decode(f, W_dec, bounds).sum().backward()
    assert "mm" in operations.names and "cumsum" not in operations.names
    assert ("slice_backward" in operations.names) == (len(bounds) > 1)


def test_a_prefix_decodes_its_own_latents_and_all_before() -> None:
    x, W_enc, bias, b_dec, W_dec = weights(1)
    (codes,) = encode(x, W_enc, bias, b_dec, [Selection(TopPerToken(6))])
    f = codes.dense(codes.values)
    for p, bound in enumerate(bounds := [1, 40, 41, F]):
        torch.testing.assert_close(codes.decode(codes.values, W_dec, bounds)[p], f[:, :bound] @ W_dec[:bound])


def test_nothing_kept_is_a_reconstruction_of_nothing() -> None:
    x, W_enc, bias, b_dec, W_dec = parts = weights()
    (codes,) = encode(x, W_enc, bias, b_dec, [Selection(Above(torch.tensor(1e9, dtype=torch.float64)))])
    assert codes.values.shape == (0,)
    assert not codes.fired(codes.values).any()
    x_hat = codes.decode(codes.values, W_dec)[0]
    assert x_hat.shape == (B, D) and not x_hat.any()
    for grad in torch.autograd.grad(x_hat.sum() + codes.values.sum(), parts, allow_unused=True, materialize_grads=True):
        assert not grad.any()


def test_a_support_by_hand() -> None:
    """[[0, 5, 7], [0, 0, 0], [2, 0, 3]]"""
    support = Support(torch.tensor([0, 0, 2, 2]), torch.tensor([1, 2, 0, 2]), (3, 3))
    values = torch.tensor([5.0, 7.0, 2.0, 3.0])
    assert support.dense(values).tolist() == [[0, 5, 7], [0, 0, 0], [2, 0, 3]]
    assert support.row_ends.tolist() == [0, 2, 2, 4]
    assert support.by_latent.order_n.tolist() == [2, 0, 1, 3]
    assert support.by_latent.ends.tolist() == [0, 1, 2, 4]
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert support.row_sums(values, rows).tolist() == [[7, 12], [0, 0], [5, 3]]
    sums, totals = support.latent_sums_and_totals(values, rows)
    assert sums.tolist() == support.latent_sums(values, rows).tolist() == [[2, 2], [5, 0], [10, 3]]
    assert totals.tolist() == [2, 5, 10]
    assert support.products(rows, rows).tolist() == [0, 1, 1, 2]
    assert support.fired(torch.tensor([1.0, 0.0, 0.0, -1.0])).tolist() == [False, True, False]


@pytest.mark.parametrize("form", ["relu", "relu bricken", "gated", "jumprelu", "jumprelu target"])
def test_dense_and_sparse_training_give_the_same_curve(form: str) -> None:
    curves, weights = [], []
    for share in (0.0, 1.0):
        with use_backend(CPUBackend(dense_share=share)):
            sae = make(form)
            steps = train(sae, 20)
        curves.append([float(step.loss.detach()) for step in steps])
        weights.append(sae.W_dec.detach())
        assert (steps[-1].codes.support is None) == (share == 0.0)
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-2, atol=1e-3)
