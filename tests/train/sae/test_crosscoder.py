"""python -m pytest tests/train/sae/test_crosscoder.py: one dictionary over several sites, in every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.base.errors import UserError
from tests.helpers.cases import CASES, DEAD, Case, as_formula, perturbed, tokens
from tests.helpers.toy import FORMS
from train.sae import SAE, VARIANTS, StepOutput, TrainContext, load, save
from train.sae.parts.sites import norms_by_site
from train.sae.parts.unit_rows import project_gradient_, renormalise_
from train.sae.parts.update import update

WIDTHS, F = (12, 20), 48
D = sum(WIDTHS)


def rows(count: int, seed: int = 0) -> Tensor:
    """[count, 12 + 20]: sparse codes of 24 features, each with a direction at either site; the second is 30 times as
    large."""
    generator = torch.Generator().manual_seed(seed)
    amounts = torch.rand(count, 24, generator=generator) + 0.5
    codes = amounts * (torch.rand(count, 24, generator=generator) < 0.08)
    parts = []
    for width, size in zip(WIDTHS, (1, 30), strict=True):
        directions = torch.randn(24, width, generator=torch.Generator().manual_seed(width))
        parts.append(size * (codes @ directions + 1))
    return torch.cat(parts, 1)


def crosscoder(form: str = "batchtopk", widths: tuple[int, ...] | None = WIDTHS, **settings: Any) -> SAE:
    name, own = FORMS[form]
    sae = VARIANTS[name](D, F, site_widths=widths, **{**own, **settings})
    sae.initialise(rows(2048))
    return sae


def train(sae: SAE, batches: list[Tensor], lr: float = 3e-3, dead_F: Tensor | None = None) -> list[StepOutput]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    steps = []
    for x_BD in batches:
        steps.append(sae.loss(sae.norm.normalise(x_BD), TrainContext(dead_F)))
        optimizer.zero_grad()
        steps[-1].loss.backward()  # type: ignore[no-untyped-call]
        update(sae, optimizer, clip=1.0)
        sae.after_step(steps[-1])
    return steps


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient_equal_the_float64_reference(case: Case, centred: bool) -> None:
    """The squared error of all sites together; the ReLU's weight of f is the sum of its decoder norms by site."""
    sae, x = perturbed(case, centred, site_widths=(3, 5)), tokens()
    parameters = as_formula({name: p.detach().numpy().copy() for name, p in sae.named_parameters()})
    options = case.options | ({"dead": DEAD} if case.uses_dead else {})
    options |= {"widths": (3, 5)} if case.name == "relu" else {}
    loss, grads = case.compute(x.numpy(), parameters, 2.5, centred, **options)
    step = sae.loss(x, TrainContext(dead_F=torch.from_numpy(DEAD)))
    step.loss.backward()  # type: ignore[no-untyped-call]
    assert step.loss.item() == pytest.approx(loss, rel=1e-12)
    found = {name: p.grad.numpy() for name, p in sae.named_parameters() if p.grad is not None}
    for name, grad in as_formula(found).items():
        np.testing.assert_allclose(grad, grads[name], rtol=1e-9, atol=1e-12, err_msg=name)
    context = TrainContext(torch.from_numpy(DEAD))
    torch.testing.assert_close(sae.loss(x, context).loss, sae.dense_loss(x, context), rtol=1e-12, atol=1e-12)


def test_the_l1_is_not_that_of_the_rows_whole_norm() -> None:
    """||w_1|| + ||w_2|| = 3 + 4 of a row whose own norm is 5, at one latent that fires with f = 2, x_hat exact."""
    sae = VARIANTS["relu"](2, 1, site_widths=[1, 1], sparsity=0.5, input_norm="none", apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.W_enc_FD.copy_(torch.tensor([[1.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[3.0, 4.0]]))
        sae.bias_F.fill_(-4)
    assert float(sae.loss(torch.tensor([[6.0, 8.0]])).loss.detach()) == pytest.approx(0.5 * 2 * 7)


@pytest.mark.parametrize("norm", ["dataset", "token", "none"])
def test_each_site_is_normalised_as_a_plain_sae_of_it_would(norm: str, tmp_path: Path) -> None:
    sae, x = crosscoder(input_norm=norm), rows(2048)
    parts = []
    for part in x.split(WIDTHS, 1):
        plain = VARIANTS["topk"](part.shape[1], F, k=4, input_norm=norm)
        plain.initialise(part)
        parts.append(plain.norm.normalise(part))
        if norm == "dataset":
            assert float(parts[-1].square().sum(1).mean()) == pytest.approx(part.shape[1], rel=1e-5)
    xn = torch.cat(parts, 1)
    torch.testing.assert_close(sae.norm.normalise(x), xn)
    torch.testing.assert_close(sae.norm.denormalise(xn, x), x, rtol=1e-4, atol=1e-4)
    assert float(sae.variance) == pytest.approx(float(xn.double().var(0, correction=0).sum()), rel=1e-5)
    save(sae, tmp_path, {"sites": [{"site": "resid_post.1"}, {"site": "resid_post.3"}]})
    again = load(tmp_path)
    assert again.site_widths == WIDTHS and "resid_post.1" in repr(again) and "resid_post.3" in repr(again)
    f, x_hat = again.encode_decode(x)
    torch.testing.assert_close(x_hat, sae(x), rtol=0, atol=0)
    torch.testing.assert_close(again.decode(f, x), x_hat)


def test_moments_by_site_are_those_of_the_rows() -> None:
    x = rows(2048)
    parts = [part.double() for part in x.split(WIDTHS, 1)]
    given = VARIANTS["topk"](D, F, site_widths=WIDTHS, k=4)
    mean_sq = [float(part.square().sum(1).mean()) for part in parts]
    given.initialise(x, mean_sq_norm=mean_sq, variance=[float(part.var(0, correction=0).sum()) for part in parts])
    measured = crosscoder("topk")
    for name, value in given.state_dict().items():
        torch.testing.assert_close(value, measured.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["relu", "relu bricken", "topk", "batchtopk", "matryoshka", "gated", "jumprelu"])
def test_of_one_site_it_is_the_plain_sae_to_the_bit(form: str) -> None:
    batches = [rows(64, seed=10 + i) for i in range(8)]
    dead_F = torch.arange(F) % 3 == 0
    one, plain = crosscoder(form, (D,)), crosscoder(form, None)
    for mine, other in zip(train(one, batches, dead_F=dead_F), train(plain, batches, dead_F=dead_F), strict=True):
        assert torch.equal(mine.loss, other.loss)
    assert one.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(one.state_dict()[name].reshape(value.shape), value), name
    assert torch.equal(one(batches[0]), plain(batches[0]))


@pytest.mark.parametrize("form", ["topk", "batchtopk", "matryoshka", "gated", "jumprelu", "relu bricken"])
def test_the_norms_of_a_row_sum_to_one_through_training(form: str) -> None:
    sae = crosscoder(form)
    torch.testing.assert_close(norms_by_site(sae.W_dec, WIDTHS).sum(0), torch.ones(F))
    train(sae, [rows(64, seed=10 + i) for i in range(5)])
    torch.testing.assert_close(norms_by_site(sae.W_dec, WIDTHS).sum(0), torch.ones(F))
    assert float((sae.W_dec.detach().norm(dim=1) - 1).abs().min()) > 0.1  # not their own norm


def test_the_projected_gradient_moves_no_row_off_the_surface() -> None:
    """By hand, and to first order: a small step along it leaves the sum of norms at 1."""
    W = nn.Parameter(torch.tensor([[0.6, 0.0, 0.4], [0.3, 0.4, -0.5]], dtype=torch.float64))
    W.grad = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]], dtype=torch.float64)
    project_gradient_(W, (2, 1))
    # Row 0: the normal is (1, 0 | 1), of which (1, 2, 3) has 4 / 2 = 2.
    torch.testing.assert_close(W.grad[0], torch.tensor([-1.0, 2.0, 1.0], dtype=torch.float64))
    moved = W.detach() - 1e-6 * W.grad
    assert float((norms_by_site(moved, (2, 1)).sum(0) - 1).abs().max()) < 1e-11
    renormalise_(moved, (2, 1))
    assert float((norms_by_site(moved, (2, 1)).sum(0) - 1).abs().max()) < 1e-15


def planted(count: int, seed: int, size: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows of two sites of 24 entries: 10 features that both have, 10 of the first alone and 10 of the second."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.nn.functional.normalize(torch.randn(2, 30, 24, generator=generator), dim=2)
    has = torch.ones(2, 30)
    has[1, 10:20] = 0
    has[0, 20:30] = 0
    directions = directions * has[:, :, None]
    draw = torch.Generator().manual_seed(seed)
    codes = (torch.rand(count, 30, generator=draw) + 0.5) * (torch.rand(count, 30, generator=draw) < 0.07)
    return torch.cat([codes @ directions[0], size * codes @ directions[1]], 1), directions


@pytest.mark.slow
@pytest.mark.parametrize("form", ["batchtopk", "relu"])
def test_a_planted_dictionary_is_found_with_its_latents_sites(form: str) -> None:
    settings: dict[str, Any] = {"batchtopk": {"k": 2}, "relu": {"sparsity": 0.1}}[form]
    sae = VARIANTS[form](48, 40, site_widths=(24, 24), **settings)
    size = 20.0  # of the second site's activations, which the normalisation takes out
    sae.initialise(planted(4096, 0, size)[0])
    train(sae, [planted(256, 1 + i, size)[0] for i in range(700)], lr=4e-3)
    _, directions = planted(1, 0)
    rows_FD = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    truth = torch.nn.functional.normalize(torch.cat([directions[0], directions[1]], 1), dim=1)
    cosine, latent = (truth @ rows_FD.T).max(1)
    assert float(cosine.min()) > 0.9
    norms = norms_by_site(sae.W_dec.detach(), (24, 24))[:, latent]
    share = norms[1] / norms.sum(0)
    shared, first, second = share[:10], share[10:20], share[20:]
    assert float(shared.min()) > 0.35 and float(shared.max()) < 0.65
    assert float(first.max()) < 0.15 and float(second.min()) > 0.85


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"site_widths=\[3, 4\] do not make up the 8 entries"):
        VARIANTS["topk"](8, 16, site_widths=[3, 4], k=2)
    with pytest.raises(UserError, match="a crosscoder reconstructs all its sites and has no target"):
        VARIANTS["topk"](8, 16, 8, site_widths=[3, 5], k=2)
    with pytest.raises(UserError, match=r"sae\.skip is a path from a transcoder's input"):
        VARIANTS["topk"](8, 16, site_widths=[3, 5], k=2, skip=True)
    with pytest.raises(UserError, match="each site needs at least 2"):
        VARIANTS["topk"](8, 16, site_widths=[1, 7], k=2, input_norm="token")
