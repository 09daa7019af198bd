"""python -m pytest -m slow tests/train/sae/test_kernels.py: the GPU's step against float64 formulas and the CPU's step.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.cases import CASES, DEAD, Case, as_formula, perturbed, tokens
from tests.helpers.toy import FORMS, activations, make, train
from train.sae import SAE, TrainContext
from train.sae.parts.unit_rows import project_gradient_
from train.sae.parts.update import update
from train.sae.sparse.backend import use_backend
from train.sae.sparse.codes import Support
from train.sae.sparse.cpu import CPUBackend
from train.sae.sparse.encode import encode
from train.sae.sparse.error import squared_error
from train.sae.sparse.row_norms import take_norms
from train.sae.sparse.rules import Above, Everything, Rule, Selection, TopOfBatch, TopPerToken
from train.sae.sparse.triton import TritonBackend
from train.sae.step import PLAIN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, D, F = 12, 5, 96
AMONG = torch.tensor([3, 7, 31, 32, 40, 64, 95], device=DEVICE)
RULES: dict[str, Rule] = {
    "topk": TopPerToken(3),
    "batchtopk": TopOfBatch(3 * B),
    "more than are positive": TopOfBatch(F * B * 3 // 4),
    "above": Above(torch.tensor(1.5, dtype=torch.float64, device=DEVICE)),
    "above, z whole": Above(torch.tensor(1.5, dtype=torch.float64, device=DEVICE)),
}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's backend, in its interpreter where there is no GPU; a GPU may be set to refuse to wait."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend(TritonBackend()):
        yield
    torch.cuda.set_sync_debug_mode(0) if DEVICE == "cuda" else None


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def weights(seed: int = 0) -> list[Tensor]:
    """x, W_enc [F, D], bias, b_dec, W_dec [F, D]."""
    shapes = [(B, D), (F, D), (F,), (D,), (F, D)]
    return [draw(*shape, seed=seed + i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("width", [1, 5, 256, 300, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_dense_matrix(width: int, dtype: torch.dtype) -> None:
    """Any D; tokens and latents with no entry, with one, and with more than a tile holds."""
    kept = torch.rand(9, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    kept[2], kept[:, 7], kept[3], kept[:, 8] = False, False, True, True
    rows_n, latents_n = kept.to(DEVICE).nonzero().unbind(1)
    support, values = Support(rows_n, latents_n, (9, 40)), draw(len(rows_n), seed=2, dtype=dtype)
    values[::5] = 0
    W, x = draw(40, width, seed=3, dtype=dtype), draw(9, width, seed=4, dtype=dtype)
    f, tolerance = support.dense(values).double(), {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {}
    for found, wanted in (
        (support.row_sums(values, W), f @ W.double()),
        (support.latent_sums(values, x), f.t() @ x.double()),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, **({"rtol": 1e-12, "atol": 1e-12} | tolerance))
    dots = support.products(x, W).double()
    wanted = (x.double() @ W.double().t())[rows_n, latents_n]
    torch.testing.assert_close(dots, wanted, **({"rtol": 1e-12, "atol": 1e-12} | tolerance))


@pytest.mark.parametrize("tokens", [1, 64, 65, 200, 1000])
def test_sums_of_a_frequent_latent_are_cut_in_pieces_and_change_nothing(tokens: int) -> None:
    """Latents that are active on all tokens, on most, on half, on one and on none."""
    kept = torch.rand(tokens, 6, generator=torch.Generator().manual_seed(1)) < torch.tensor([2, 0.9, 0.5, 0.1, 0, 2])
    kept[0, 3] = True
    rows_n, latents_n = kept.to(DEVICE).nonzero().unbind(1)
    support, values = Support(rows_n, latents_n, (tokens, 6)), draw(len(rows_n), seed=2)
    values[::7] = 0
    x = draw(tokens, 5, seed=3)
    sums, totals = support.latent_sums_and_totals(values, x)
    f = support.dense(values)
    torch.testing.assert_close(sums, f.t() @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(totals, f.sum(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(sums, support.latent_sums(values, x))
    assert (support.by_latent.pieces is not None) == (len(rows_n) > 64)


@pytest.mark.parametrize("width", [1, 5, 300])
def test_a_gradient_comes_with_the_norms_of_its_rows(width: int) -> None:
    """Latents on all tokens, on some and on none; rows whose gradient is nearly all along them, which goes."""
    kept = torch.rand(200, 6, generator=torch.Generator().manual_seed(1)) < torch.tensor([2, 0.9, 0.5, 0.1, 0, 2])
    rows_n, latents_n = kept.to(DEVICE).nonzero().unbind(1)
    support, values, x = Support(rows_n, latents_n, (200, 6)), draw(len(rows_n), seed=2), draw(200, width, seed=3)
    wanted = support.dense(values).t() @ x
    unit = torch.nn.functional.normalize(draw(6, width, seed=4))
    unit[0] = torch.nn.functional.normalize(wanted[0] + 1e-6 * unit[0], dim=0)
    for rows_FD in (None, unit):
        grad, totals = support.latent_gradient(values, x, rows_FD)
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(totals, support.dense(values).sum(0), rtol=1e-12, atol=1e-12)
        norms = take_norms(grad, unit=rows_FD is not None)
        assert norms is not None
        if rows_FD is None:
            torch.testing.assert_close(norms.squares_F, wanted.square().sum(1), rtol=1e-12, atol=1e-12)
            continue
        dots = (wanted * rows_FD).sum(1)
        assert norms.dots_F is not None
        torch.testing.assert_close(norms.dots_F, dots, rtol=1e-12, atol=1e-12)
        left = (wanted - dots[:, None] * rows_FD).square().sum(1)
        torch.testing.assert_close(norms.squares_F, left, rtol=1e-6, atol=1e-24)


@pytest.mark.parametrize("form", ["topk", "topk multi", "matryoshka"])
def test_an_update_after_a_backward_is_the_cpus(form: str) -> None:
    """Whether the norms came with the gradients, with one of the two, or with none, as where AuxK adds to both."""
    for dead in (0, 9):
        weights_after = []
        for backend in (TritonBackend(), CPUBackend()):
            sae = made(form).double().to(DEVICE)
            optimizer = torch.optim.Adam(sae.parameters(), lr=2.0**-7, betas=(0.875, 0.75), eps=2.0**-30, fused=True)
            dead_F = torch.arange(sae.width, device=DEVICE) < dead
            listed = torch.arange(16, device=DEVICE) if backend.fixed_sizes else None
            with use_backend(backend):
                for seed in range(2):
                    step = sae.loss(draw(6, sae.d_in, seed=seed), TrainContext(dead_F, listed) if dead else PLAIN)
                    step.loss.backward()  # type: ignore[no-untyped-call]
                    update(sae, optimizer, 1e-3)
                    optimizer.zero_grad()
            weights_after.append([parameter.detach() for parameter in sae.parameters()])
        for one, other in zip(*weights_after, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("width", [1, 5, 300])
@pytest.mark.parametrize("rows", [1, 9], ids=["one base", "a base for each token"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bounds", [None, [1, 60], [2, 3, 17, 40, 60]], ids=["all", "2 prefixes", "5 prefixes"])
def test_an_error_with_its_gradients_is_that_of_the_dense_formula(
    width: int, rows: int, bounds: list[int] | None, zeros: bool
) -> None:
    """Tokens with no entry, with one, and with many more than a tile of 16; bands without an entry and with more than a
    tile of them; values of 0 with a gradient or without.
    """
    kept = torch.rand(9, 60, generator=torch.Generator().manual_seed(1)) < 0.1
    kept[2], kept[3], kept[4, 1:] = False, True, False
    kept[4, 0] = True
    rows_n, latents_n = kept.to(DEVICE).nonzero().unbind(1)
    support = Support(rows_n, latents_n, (9, 60))
    values = draw(len(rows_n), seed=2).abs()
    values[::5] = 0
    W, target, base = draw(60, width, seed=3), draw(9, width, seed=4), draw(rows, width, seed=5)
    parts = [part.requires_grad_() for part in (values, W, base[0] if rows == 1 else base)]
    result = squared_error(*parts, target, support, bounds=bounds, through_zeros=zeros)  # type: ignore[misc]
    f = support.dense(parts[0])
    errors = [f[:, :bound] @ parts[1][:bound] + parts[2] - target for bound in bounds or [60]]
    wanted_total = torch.stack([error.square().sum() for error in errors]).sum()
    torch.testing.assert_close(result.error_BE, errors[-1].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.total, wanted_total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.last_B, errors[-1].detach().square().sum(1), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(result.total.sin(), parts)
    wanted = list(torch.autograd.grad(wanted_total.sin(), parts))
    if not zeros:
        wanted[0] = torch.where(values == 0, 0.0, wanted[0])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_row_of_an_entry_of_value_0_is_not_read() -> None:
    """What fills a selection up names any latent, whose weights may be NaN."""
    rows_n, latents_n = torch.tensor([[0, 0], [0, 1]], device=DEVICE).t().contiguous().unbind(1)
    W, target = draw(2, 5, seed=1), draw(1, 5, seed=2)
    W[1] = torch.nan
    support = Support(rows_n.contiguous(), latents_n.contiguous(), (1, 2))
    values = torch.tensor([2.0, 0.0], dtype=torch.float64, device=DEVICE)
    result = squared_error(values, W, torch.zeros_like(W[0]), target, support)
    torch.testing.assert_close(result.error_BE, 2 * W[:1] - target)
    torch.testing.assert_close(result.total, result.error_BE.square().sum())


@pytest.mark.parametrize("width", [1, 5, 300])
def test_the_gradients_part_along_each_row_goes(width: int) -> None:
    W = torch.nn.Parameter(torch.nn.functional.normalize(draw(7, width), dim=1))
    grad = draw(7, width, seed=1)
    W.grad = grad.clone()
    project_gradient_(W)
    torch.testing.assert_close(W.grad, grad - (grad * W).sum(1, keepdim=True) * W.detach())


@pytest.mark.parametrize("block", [1 << 24, B * 70], ids=["one block", "two uneven blocks"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("aside", [None, "held", "selected"])
def test_values_and_every_gradient_are_those_of_the_dense_formula(name: str, aside: str | None, block: int) -> None:
    x, W_enc, bias, b_dec, W_dec = parts = weights()
    selections = [Selection(RULES[name])]
    if aside is not None:
        selections.append(Selection(TopPerToken(2, positive=False) if aside == "selected" else Everything(), AMONG))
    with use_backend(TritonBackend(block_entries=block, dense_share=1.0 if name == "above" else 0.0)):
        codes, *others = encode(x, W_enc, bias, b_dec, selections)
    assert (codes.support is None) == (name == "above, z whole")
    f = codes.values if not name.startswith("above") else torch.where(codes.values > 1.5, codes.values, 0.0)
    bounds = [10, 11, 60, F]
    loss = (codes.decode(f, W_dec, bounds).sin() ** 2).sum() + codes.totals(f).square().sum()
    z = (x - b_dec) @ W_enc.t() + bias
    if name == "topk":
        kept = torch.zeros_like(z, dtype=torch.bool).scatter_(1, z.topk(3, dim=1).indices, True)
    elif name.startswith("above"):
        kept = z > 1.5
    else:
        kept = z >= z.flatten().topk(len(codes.values)).values[-1]
    f_BF = torch.where(kept & (z > 0), z, 0.0)
    assert torch.equal(codes.fired(f), (f_BF > 0).any(0))
    x_hat_PBD = torch.stack([f_BF[:, :bound] @ W_dec[:bound] for bound in bounds])
    wanted = (x_hat_PBD.sin() ** 2).sum() + f_BF.sum(0).square().sum()
    for beside in others:
        loss = loss + (beside.decode(beside.values.cos(), W_dec[AMONG])[0] ** 2).sum()
        z_Bd = z[:, AMONG]
        of_aside = torch.ones_like(z_Bd, dtype=torch.bool)
        if aside == "selected":
            of_aside = torch.zeros_like(of_aside).scatter_(1, z_Bd.topk(2, dim=1).indices, True)
        wanted = wanted + (torch.where(of_aside, z_Bd.cos(), 0.0) @ W_dec[AMONG]).square().sum()
    torch.testing.assert_close(loss, wanted)
    for one, other in zip(torch.autograd.grad(loss, parts), torch.autograd.grad(wanted, parts), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("held", [0, 128])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient_equal_the_float64_reference(case: Case, held: int) -> None:
    """The dead of `DEAD` among all latents, their z held or selected; what is above a bound sparse."""
    if not case.uses_dead and held:
        return
    sae, x = perturbed(case, True), tokens()
    parameters = as_formula({name: p.detach().numpy().copy() for name, p in sae.named_parameters()})
    options = case.options | ({"dead": DEAD} if case.uses_dead else {})
    loss, grads = case.compute(x.numpy(), parameters, 2.5, True, **options)
    context = TrainContext(torch.from_numpy(DEAD).to(DEVICE), torch.arange(sae.width, device=DEVICE))
    with use_backend(TritonBackend(dense_dead=held, dense_share=1.0)):
        step = sae.to(DEVICE).loss(x.to(DEVICE), context)
        assert step.codes.support is not None
        step.loss.backward()
    assert step.loss.item() == pytest.approx(loss, rel=1e-12)
    found = {name: p.grad.cpu().numpy() for name, p in sae.named_parameters() if p.grad is not None}
    assert len(found) == len(parameters)
    for name, grad in as_formula(found).items():
        np.testing.assert_allclose(grad, grads[name], rtol=1e-9, atol=1e-12, err_msg=name)


def made(form: str) -> SAE:
    """Initialised by the CPU's backend, on more tokens than the interpreter can take."""
    with use_backend(CPUBackend()):
        return make(form)


def grads(sae: SAE, x: Tensor, context: TrainContext) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Gradients, figures of the loss, and what fired."""
    sae.zero_grad()
    step = sae.loss(sae.norm.normalise(x), context)
    step.loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in sae.parameters()]
    return found, step.figures, step.fired_F


@pytest.mark.parametrize(("dead", "held"), [(0, 128), (3, 128), (20, 128), (3, 0), (20, 0)])
@pytest.mark.parametrize("form", ["topk multi", "topk reference auxk", "matryoshka"])
def test_a_loss_is_that_of_the_cpus_step(form: str, dead: int, held: int) -> None:
    """Every term, every gradient and what fired, in float64, with none, few and many dead of 48 that might be."""
    sae, x = made(form).double().to(DEVICE), activations(6).double().to(DEVICE)
    dead_F = torch.zeros(sae.width, dtype=torch.bool, device=DEVICE)
    dead_F[1 : 2 * dead : 2] = True
    with torch.no_grad():
        sae.get_parameter("b_enc")[dead_F] -= 5.0
    with use_backend(TritonBackend(dense_dead=held)):
        found, figures, fired_F = grads(sae, x, TrainContext(dead_F, torch.arange(48, device=DEVICE)))
    with use_backend(CPUBackend()):
        wanted, wanted_figures, wanted_F = grads(sae, x, TrainContext(dead_F))
    assert figures.keys() == wanted_figures.keys()
    for name, value in wanted_figures.items():
        torch.testing.assert_close(figures[name].double(), value.double(), msg=name)
    assert torch.equal(fired_F, wanted_F)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU to wait for")
@pytest.mark.parametrize("form", FORMS)
def test_a_step_waits_for_no_device_but_for_how_many_are_above_a_bound(form: str) -> None:
    entries: list[int] = []

    class Reading(TritonBackend):
        """Lets this one wait by, and notes it."""

        def read(self, number: Tensor) -> int:
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(0)
            entries.append(int(number))
            torch.cuda.set_sync_debug_mode(mode)
            return entries[-1]

    sae, x = made(form).to(DEVICE), activations(64).to(DEVICE)
    context = TrainContext(torch.arange(sae.width, device=DEVICE) < 20, torch.arange(30, device=DEVICE))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    for mode in (0, 2):  # once to compile; then a wait is an error
        torch.cuda.set_sync_debug_mode(mode)
        with use_backend(Reading()):
            step = sae.loss(sae.norm.normalise(x), context)
        optimizer.zero_grad()
        step.loss.backward()
        if sae.unit_rows:
            project_gradient_(sae.W_dec)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.after_step(step)
        assert step.fired_F.shape == (sae.width,)
    one_a_step = 2 if FORMS[form][0] in ("relu", "gated", "jumprelu") else 0  # of two steps
    assert len(entries) == one_a_step


def test_training_follows_the_cpus_curve() -> None:
    curves = []
    for backend in (TritonBackend(), CPUBackend()):
        sae = made("batchtopk").to(DEVICE if isinstance(backend, TritonBackend) else "cpu")
        with use_backend(backend):
            curves.append([float(step.loss.detach()) for step in train(sae, 4, batch=32)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
