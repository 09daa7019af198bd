"""python -m pytest tests/train/sae/test_transcoder.py: what a transcoder is beside an SAE, in every variant."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from tests.helpers.cases import CASES, DEAD, Case, as_formula, perturbed, tokens
from tests.helpers.toy import FORMS, make
from train.interop.fold import folded
from train.sae import SAE, VARIANTS, Batch, StartRows, TrainContext, load, save
from train.sae.metrics import held_out
from train.sae.parts.update import update
from train.sae.sparse.backend import use_backend
from train.sae.sparse.triton import TritonBackend

D, E, F, FEATURES = 32, 24, 48, 24
SKIP = pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])


def sites(rows: int, seed: int = 0) -> Batch:
    """Sparse codes of 24 features: [rows, D] of a first site, and [rows, E] of a second that is a map of them."""
    generator = torch.Generator().manual_seed(seed)
    amounts = torch.rand(rows, FEATURES, generator=generator) + 0.5
    codes = amounts * (torch.rand(rows, FEATURES, generator=generator) < 0.08)
    return Batch(codes @ directions(D) + 2, 3 * codes @ directions(E) - 1)


def directions(width: int) -> Tensor:
    rows = torch.randn(FEATURES, width, generator=torch.Generator().manual_seed(width))
    return rows / rows.norm(dim=1, keepdim=True)


def transcoder(form: str, **settings: Any) -> SAE:
    name, own = FORMS[form]
    return started(VARIANTS[name](D, F, E, **{**own, "apply_b_dec_to_input": False, **settings}))


def started(sae: SAE, rows: int = 2048) -> SAE:
    x, target = sites(rows)
    assert target is not None
    sae.initialise(x, target=StartRows(target))
    return sae


@SKIP
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient_equal_the_float64_reference(case: Case, skip: bool) -> None:
    sae, x, y = perturbed(case, centred=False, d_out=6, skip=skip), tokens(), tokens(6, seed=4)
    parameters = as_formula({name: p.detach().numpy().copy() for name, p in sae.named_parameters()})
    options = case.options | ({"dead": DEAD} if case.uses_dead else {})
    loss, grads = case.compute(
        x.numpy(), parameters, 2.5, False, y=y.numpy(), centre=sae.centre.numpy().copy(), **options
    )
    step = sae.loss(x, TrainContext(dead_F=torch.from_numpy(DEAD), target_BE=y))
    step.loss.backward()
    assert step.loss.item() == pytest.approx(loss, rel=1e-12)
    found = {name: p.grad.numpy() for name, p in sae.named_parameters() if p.grad is not None}
    assert found.keys() == {name for name, _ in sae.named_parameters()} and ("W_skip" in found) == skip
    for name, grad in as_formula(found).items():
        np.testing.assert_allclose(grad, grads[name], rtol=1e-9, atol=1e-12, err_msg=name)
        assert np.abs(grads[name]).max() > 1e-4, f"the case does not exercise {name}"


@SKIP
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sparse_step_equals_the_dense_form(case: Case, skip: bool) -> None:
    sae, x, y = perturbed(case, centred=False, d_out=6, skip=skip), tokens(), tokens(6, seed=4)
    torch.testing.assert_close(sae.encode_normalised(x), sae.dense_encode(x).detach())
    context = TrainContext(torch.from_numpy(DEAD), target_BE=y, sparsity_scale=0.7)
    torch.testing.assert_close(sae.loss(x, context).loss, sae.dense_loss(x, context), rtol=1e-12, atol=1e-12)


@SKIP
@pytest.mark.parametrize("form", FORMS)
def test_the_inference_form_predicts_the_target_in_its_own_units(form: str, skip: bool, tmp_path: Path) -> None:
    sae = transcoder(form, skip=skip)
    if sae.W_skip is not None:
        torch.nn.init.normal_(sae.W_skip, std=0.1)
    x, _ = sites(64, seed=9)
    # By the formula, with s and t of the two norms: y_hat = (f W_dec + b_dec + (s x - centre) W_skip) / t.
    xc = sae.norm.scale * x - sae.centre
    f = sae.encode(x)
    torch.testing.assert_close(f, sae.dense_encode(sae.norm.scale * x).detach())
    beside = sae.b_dec if sae.W_skip is None else sae.b_dec + xc @ sae.W_skip
    wanted = ((f @ sae.W_dec + beside) / sae.norm_out.scale).detach()
    torch.testing.assert_close(sae(x), wanted)
    torch.testing.assert_close(sae.decode(f, x), wanted)
    assert sae(x.unflatten(0, (2, 32))).shape == (2, 32, E)
    save(sae, tmp_path, {"site": "mlp_in.1", "target": "mlp_out.1"})
    again = load(tmp_path)
    assert (again.site, again.target, again.d_out, again.skip) == ("mlp_in.1", "mlp_out.1", E, skip)
    assert torch.equal(again(x), sae(x))


@SKIP
@pytest.mark.parametrize("form", FORMS)
def test_folding_both_norms_changes_no_prediction(form: str, skip: bool) -> None:
    sae = transcoder(form, skip=skip)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "theta":
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    x, _ = sites(64, seed=9)
    plain = folded(sae)
    torch.testing.assert_close(plain(x), sae(x), rtol=1e-4, atol=1e-4)
    # What a reader of the weights alone computes: no norm, no centre.
    assert plain.input_norm == "none" and not bool(plain.centre.any())
    assert float(plain.norm.scale) == float(plain.norm_out.scale) == 1
    ratio = 1.0 if form in ("relu", "relu at k") else float(sae.norm_out.scale)
    if ratio != 1:
        torch.testing.assert_close(plain.encode(x) * ratio, sae.encode(x), rtol=1e-3, atol=1e-3)


@SKIP
@pytest.mark.parametrize("form", ["topk", "jumprelu", "relu"])
def test_it_starts_at_the_targets_centre_with_latents_of_its_scale(form: str, skip: bool) -> None:
    sae = transcoder(form, skip=skip)
    x, y = sites(2048)
    assert y is not None
    moved = sae.norm_out.normalise(y) - sae.b_dec
    step = sae.loss(sae.norm.normalise(x), TrainContext(target_BE=moved))
    part = (step.xn_hat_BD - sae.b_dec).detach()
    assert float(part.square().sum()) == pytest.approx(float(moved.detach().square().sum()), rel=0.2)
    # E||y'||^2 = E by the norm, and Vx is the target's.
    assert float(sae.norm_out.normalise(y).square().sum(1).mean()) == pytest.approx(E, rel=1e-5)
    spread = sae.norm_out.normalise(y).var(0, correction=0).sum()
    assert float(sae.variance) == pytest.approx(float(spread), rel=1e-4)
    assert sae.W_skip is None or not bool(sae.W_skip.any())
    # Not tied: no latent's encoder is near its decoder row, where the widths are equal.
    square = VARIANTS["topk"](D, F, D, k=4)
    square.initialise(x, target=StartRows(x.flip(1)))
    cosines = torch.nn.functional.cosine_similarity(square.W_enc_FD, square.W_dec)
    assert float(cosines.detach().abs().mean()) < 0.3


@pytest.mark.slow
def test_a_known_sparse_map_is_recovered() -> None:
    """Each feature's direction in the second site is a decoder row, of a latent that fires with the feature."""
    sae = started(VARIANTS["batchtopk"](D, F, E, k=2, apply_b_dec_to_input=False))
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    steps = 700
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 3 * (steps - number) / steps)
        x, y = sites(256, seed=100 + number)
        assert y is not None
        step = sae.loss(sae.norm.normalise(x), TrainContext(target_BE=sae.norm_out.normalise(y)))
        step.loss.backward()
        update(sae, optimizer, clip=1.0)
        optimizer.zero_grad()
        sae.after_step(step)
    (found,) = held_out([sae], [sites(4096, seed=7)], torch.device("cpu"))
    assert found["nmse"] < 0.2  # two latents a token, of which some have up to six features
    cosine = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) @ directions(E).t()
    best = cosine.max(0)
    assert float(best.values.min()) > 0.9
    # A token with one feature alone fires that feature's latent.
    alone = sae.encode(directions(D) + 2)
    assert (alone.argmax(1) == best.indices).all()


def test_an_sae_has_one_norm_and_nothing_of_a_transcoder() -> None:
    sae = make("topk")
    assert sae.norm_out is sae.norm and (sae.target, sae.d_out) == (None, sae.d_in)
    assert not {"W_skip", "centre", "norm_target.scale"} & sae.state_dict().keys()
    assert not {"skip", "d_out"} & sae.settings().keys()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input"),
        ({"input_norm": "token"}, "input_norm=dataset"),
    ],
)
def test_what_means_nothing_between_two_sites_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        VARIANTS["topk"](D, F, E, k=4, **settings)


def test_a_skip_is_refused_in_an_sae_and_needs_the_input_to_decode() -> None:
    with pytest.raises(UserError, match=r"give target, or sae\.skip=false"):
        VARIANTS["topk"](D, F, k=4, skip=True)
    sae = transcoder("topk", skip=True)
    with pytest.raises(UserError, match=r"decode\(f, x\)"):
        sae.decode(torch.zeros(3, F))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton")
@pytest.mark.parametrize("case", [case for case in CASES if "=" not in str(case).partition("k=")[2]], ids=str)
def test_the_gpu_step_equals_the_dense_form(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where there is one, else in Triton's interpreter: decoder rows of another width than the encoder's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    sae = perturbed(case, centred=False, d_out=6, skip=True).to(device)
    x, y = tokens().to(device), tokens(6, seed=4).to(device)
    context = TrainContext(torch.from_numpy(DEAD).to(device), target_BE=y)
    with use_backend(TritonBackend()):
        found = sae.loss(x, context).loss
        gradients = torch.autograd.grad(found, list(sae.parameters()), allow_unused=True)
    wanted = sae.dense_loss(x, context)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for found_grad, grad in zip(gradients, torch.autograd.grad(wanted, list(sae.parameters())), strict=True):
        torch.testing.assert_close(found_grad, grad, rtol=1e-9, atol=1e-12)
