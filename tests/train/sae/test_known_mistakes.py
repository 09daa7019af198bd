"""python -m pytest tests/train/sae/test_known_mistakes.py: what others got wrong, methods.md section 4, by its numbers.

Number 10 (loss recovered) is evaluate's, and so are the averaged ratios of 9; the half a loss can get wrong is here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from tests.helpers.toy import FORMS, D, F, K, activations, f_of, make, train, train_step
from train.sae import VARIANTS, DeadLatents, TrainContext, load, save
from train.sae.parts.unit_rows import project_gradient_, renormalise_
from train.sae.variants.batchtopk import BatchTopKBase

TOPK_FAMILY = ["topk", "batchtopk", "matryoshka"]


def l0(f: Tensor) -> float:
    return (f > 0).sum().item() / len(f)


@pytest.mark.parametrize("form", ["batchtopk", "matryoshka"])
def test_mistake_01_a_threshold_learnt_late_or_not_saved_ships_a_relu(form: str, tmp_path: Path) -> None:
    sae, held = make(form), activations(2000, seed=5)
    steps = train(sae, 20)  # far fewer than 1000
    assert isinstance(sae, BatchTopKBase)
    assert sae.threshold >= min(step.min_kept for step in steps if step.min_kept is not None) > 0
    save(sae, tmp_path, {})
    as_relu = l0(sae.pre_activation(sae.norm.normalise(held)))
    assert as_relu > 4 * K  # what would ship without T
    assert l0(load(tmp_path).encode(held)) == pytest.approx(K, rel=0.3)
    sae.calibrate(list(activations(4096, seed=6).split(128)))
    assert l0(sae.encode(held)) == pytest.approx(K, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_mistake_02_logging_or_validating_moves_the_threshold_and_the_counters(form: str) -> None:
    sae, dead, x = make(form), DeadLatents(F), activations(64, seed=5)
    train(sae, 2)
    dead.update(sae.loss(x).fired_F, 64)
    before = {**sae.state_dict(), "since_F": dead.since_F}
    before = {name: tensor.clone() for name, tensor in before.items()}
    with torch.no_grad():
        sae.eval()
        step = sae.loss(sae.norm.normalise(x), TrainContext(dead_F=dead.mask(64)))
        sae.encode_decode(x)
        sae.train()
        sae.encode_decode(x)
        _ = step.fired_F, dead.mask(1), dead.mask(10**9)
    after = {**sae.state_dict(), "since_F": dead.since_F}
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("form", FORMS)
def test_mistake_03_the_scale_is_never_written(form: str, tmp_path: Path) -> None:
    sae = make(form)
    train(sae, 20)
    assert sae.norm.scale < 0.5
    save(sae, tmp_path, {})
    held = activations(1000, seed=5)
    loaded = load(tmp_path)
    assert torch.equal(loaded.norm.scale, sae.norm.scale)
    assert l0(loaded.encode(held)) == l0(sae.encode(held))
    torch.testing.assert_close(loaded(held), sae(held))


@pytest.mark.parametrize("form", FORMS)
def test_mistake_03_nothing_depends_on_the_units_of_the_model(form: str) -> None:
    """The same activations in other units: the same latents and losses in x' units, x_hat in the other units."""
    name, own = FORMS[form]
    x = activations(2048)
    found = []
    for unit in (1.0, 16.0):  # a power of two: exact
        sae = VARIANTS[name](D, F, **own)
        sae.initialise(unit * x)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        for i in range(3):
            train_step(sae, optimizer, unit * activations(128, seed=50 + i))
        held = activations(256, seed=5)
        found.append((sae.encode(unit * held), sae(unit * held) / unit, sae.loss(sae.norm.normalise(unit * held)).loss))
    for ours, scaled in zip(*found, strict=True):
        torch.testing.assert_close(ours, scaled)


@pytest.mark.parametrize("form", TOPK_FAMILY)
def test_mistake_04_auxk_trains_no_encoder(form: str) -> None:
    sae, xn = make(form), activations(64, seed=5)
    dead_F = torch.arange(F) < 6  # fewer than k_aux = 8: each is taken for every token
    with torch.no_grad():
        sae.get_parameter("b_enc")[dead_F] = -50.0
    sae.loss(xn, TrainContext(dead_F=dead_F)).loss.backward()
    grad_enc, grad_bias = sae.W_enc_FD.grad, sae.get_parameter("b_enc").grad
    assert grad_enc is not None and grad_bias is not None
    assert (grad_enc[dead_F].abs().amax(1) > 0).all()
    assert (grad_bias[dead_F] != 0).all()


def test_mistake_04_multi_topk_trains_no_encoder() -> None:
    plain, multi = make("topk"), make("topk multi")
    xn = activations(64, seed=5)
    beyond_F = torch.ones(F, dtype=torch.bool)
    for sae in (plain, multi):
        step = sae.loss(xn)
        step.loss.backward()
        beyond_F &= ~step.fired_F
    with torch.no_grad():
        order = plain.pre_activation(xn).argsort(dim=1, descending=True)[:, K : 4 * K]
    beyond_F &= torch.zeros(F, dtype=torch.bool).index_fill(0, order.flatten().unique(), True)
    assert beyond_F.any()  # latents among the 4k largest of some token and the k largest of none
    assert plain.W_enc_FD.grad is not None and multi.W_enc_FD.grad is not None
    assert not plain.W_enc_FD.grad[beyond_F].any()
    assert (multi.W_enc_FD.grad[beyond_F].abs().amax(1) > 0).all()


@pytest.mark.parametrize("form", TOPK_FAMILY)
def test_mistake_05_auxk_on_an_undetached_residual(form: str) -> None:
    """Live decoder rows and b_dec's part in the output get nothing from AuxK."""
    sae, xn = make(form, auxk_alpha=10.0), activations(64, seed=5)
    dead_F = torch.arange(F) < 6
    with torch.no_grad():
        sae.get_parameter("b_enc")[dead_F] = -50.0
    grads = []
    for dead in (None, dead_F):
        sae.zero_grad()
        sae.loss(xn, TrainContext(dead_F=dead)).loss.backward()
        assert sae.W_dec.grad is not None
        grads.append(sae.W_dec.grad.clone())
    torch.testing.assert_close(grads[1][~dead_F], grads[0][~dead_F])
    assert (grads[1] - grads[0])[dead_F].abs().amax() > 1e-3


@pytest.mark.parametrize("form", TOPK_FAMILY)
def test_mistake_05_auxk_with_b_dec_added(form: str) -> None:
    sae, xn = make(form, apply_b_dec_to_input=False), activations(64, seed=5)
    dead_F = torch.arange(F) < 6
    before = sae.loss(xn, TrainContext(dead_F=dead_F))
    shift = torch.full((D,), 10.0)
    with torch.no_grad():  # the same residual and z, another b_dec
        sae.b_dec += shift
        sae.get_parameter("b_enc").sub_(shift @ sae.W_enc)
    after = sae.loss(xn + shift, TrainContext(dead_F=dead_F))
    torch.testing.assert_close(after.metrics["auxk"], before.metrics["auxk"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", TOPK_FAMILY)
def test_mistake_05_live_latents_win_auxk_because_dead_ones_are_negative(form: str) -> None:
    xn, dead_F = activations(64, seed=5), torch.arange(F) < 20
    grads = []
    for alpha in (0.0, 1.0):
        sae = make(form, auxk_alpha=alpha)
        with torch.no_grad():
            sae.get_parameter("b_enc")[dead_F] = -50.0
        assert (sae.pre_activation(xn)[:, dead_F] < 0).all()
        sae.loss(xn, TrainContext(dead_F=dead_F)).loss.backward()
        assert sae.W_enc_FD.grad is not None
        grads.append(sae.W_enc_FD.grad.clone())
    moved_F = (grads[1] - grads[0]).abs().amax(1) > 1e-6
    assert moved_F[dead_F].sum() >= 8  # k_aux = 8 of them for each token
    assert not moved_F[~dead_F].any()


def test_mistake_06_the_step_is_taken_after_the_jump() -> None:
    """z just below theta is inside the kernel: it pulls theta down towards itself, though f is 0 there."""
    settings: dict[str, Any] = {"sparsity": 0.0, "bandwidth": 0.4, "input_norm": "none"}
    sae = VARIANTS["jumprelu"](2, 1, **settings)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
        sae.get_parameter("theta").fill_(1.0)
        sae.mean_sq.fill_(1.0)
    for z, wanted in ((0.9, -(1 / 0.4) * 2 * -0.9), (1.1, 0.0), (0.79, 0.0)):
        sae.zero_grad()
        sae.loss(torch.tensor([[z, 0.0]])).loss.backward()
        grad = sae.get_parameter("theta").grad
        assert grad is not None
        assert grad.item() == pytest.approx(wanted, abs=1e-6)


def test_mistake_06_the_penalty_counts_both_halves_of_the_kernel() -> None:
    sae = VARIANTS["jumprelu"](1, 1, sparsity=1.0, bandwidth=0.4, input_norm="none")
    with torch.no_grad():
        sae.W_enc.fill_(1.0)
        sae.W_dec.zero_()  # nothing but the penalty
        sae.get_parameter("theta").fill_(1.0)
        sae.mean_sq.fill_(1.0)
    sae.loss(torch.tensor([[0.85], [1.15], [0.5], [1.5]])).loss.backward()
    grad = sae.get_parameter("theta").grad
    assert grad is not None
    assert grad.item() == pytest.approx(-2 / 0.4 / 4)
    assert sae.W_enc_FD.grad is not None and not sae.W_enc_FD.grad.any()  # nothing to z through the step


def test_mistake_06_theta_is_trained_itself_and_stays_positive() -> None:
    sae = make("jumprelu", sparsity=0.0)
    theta = sae.get_parameter("theta")
    step = sae.loss(activations(8))
    with torch.no_grad():
        theta[:5] = -0.1
    sae.after_step(step)
    assert (theta > 0).all()
    # Under Adam it moves by lr a step, whatever its size: a log theta would move by lr * theta.
    sae = make("jumprelu", sparsity=1.0)
    before = sae.get_parameter("theta").detach().clone()
    assert before.max() < 0.01
    train_step(sae, torch.optim.Adam(sae.parameters(), lr=1e-3), activations(4096, seed=5))
    moved = (sae.get_parameter("theta").detach() - before).abs()
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("form", [form for form in FORMS if make(form).unit_rows])
def test_mistake_07_the_decoder_is_normalised_before_the_step(form: str, tmp_path: Path) -> None:
    sae, wrong = make(form), make(form)
    train(sae, 3, lr=0.02)
    optimizer = torch.optim.Adam(wrong.parameters(), lr=0.02)
    wrong.loss(wrong.norm.normalise(activations(128))).loss.backward()
    project_gradient_(wrong.W_dec)
    renormalise_(wrong.W_dec)
    optimizer.step()
    assert (torch.linalg.vector_norm(wrong.W_dec, dim=1) - 1).abs().max() > 1e-4
    save(sae, tmp_path, {})
    norms = torch.linalg.vector_norm(load(tmp_path).W_dec, dim=1)
    torch.testing.assert_close(norms, torch.ones(F), rtol=0, atol=2e-7)


def test_mistake_08_the_auxiliary_decoder_of_gated_is_not_detached() -> None:
    """With b_mag far below 0 nothing fires: the main loss reaches b_dec alone, all else is the auxiliary's."""
    sae, xn = make("gated"), activations(64, seed=5)
    with torch.no_grad():
        sae.get_parameter("b_mag").fill_(-1e3)
    step = sae.loss(xn)
    step.loss.backward()
    assert step.metrics["auxiliary"] > 0 and not f_of(step).any()
    assert sae.W_dec.grad is not None and not sae.W_dec.grad.any()
    assert sae.W_enc_FD.grad is not None and sae.W_enc_FD.grad.any()
    # b_dec: the main loss's 2 (b_dec - x) / (B Vx), and -W_enc dpi through x' - b_dec, nothing as the output's bias.
    main = (2 * (sae.b_dec - xn) / (64 * sae.variance)).sum(0)
    pi_grad = sae.get_parameter("b_gate").grad
    assert pi_grad is not None and sae.b_dec.grad is not None
    torch.testing.assert_close(sae.b_dec.grad, (main - sae.W_enc @ pi_grad).detach())


def test_mistake_08_the_gate_passes_no_gradient() -> None:
    sae, xn = make("gated", sparsity=0.0), activations(64, seed=5)
    with torch.no_grad():
        sae.get_parameter("b_gate").fill_(1e3)  # open everywhere
    step = sae.loss(xn)
    (of_loss,) = torch.autograd.grad(step.loss, sae.get_parameter("b_gate"), retain_graph=True)
    gate = sae.pre_activation(xn).relu()
    auxiliary = sae.nmse(gate @ sae.W_dec.detach() + sae.b_dec.detach(), xn)
    (of_auxiliary,) = torch.autograd.grad(auxiliary, sae.get_parameter("b_gate"))
    torch.testing.assert_close(of_loss, of_auxiliary, rtol=1e-4, atol=1e-4 * of_auxiliary.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
def test_mistake_09_centring_the_residual_hides_a_constant_error(form: str) -> None:
    sae, x = make(form), activations(256, seed=5)
    xn = sae.norm.normalise(x)
    xn_hat = sae.decode_normalised(sae.encode_normalised(xn))
    offset = torch.full((D,), 0.7)
    error, shift = xn_hat - xn, offset.square().sum()
    wanted = sae.nmse(xn_hat, xn) + (2 * (error @ offset).mean() + shift) / sae.variance
    torch.testing.assert_close(sae.nmse(xn_hat + offset, xn), wanted)
    # NMSE 1 is the mean, and the zero vector costs the mean's length on top.
    torch.testing.assert_close(sae.nmse(xn.mean(0).expand_as(xn), xn).item(), 1.0, rtol=0.15, atol=0)
    assert sae.nmse(torch.zeros_like(xn), xn) > 2


@pytest.mark.parametrize("form", ["batchtopk", "matryoshka"])
def test_mistake_11_training_form_metrics_for_a_model_that_ships_a_threshold(form: str) -> None:
    """Tokens of unequal strength: the batch form keeps k a token of any batch, the threshold does not."""
    sae = make(form)
    assert isinstance(sae, BatchTopKBase)
    sae.calibrate(list(activations(2048, seed=6).split(128)))
    mean = activations(2048).mean(0)
    faint = mean + 0.1 * (activations(128, seed=5) - mean)
    codes, f = sae.active_batch(sae.norm.normalise(faint))
    batch_form, shipped = codes.dense(f), sae.encode_decode(faint)[0]
    assert l0(batch_form) == K
    assert l0(shipped) < K / 2
    assert torch.equal(f_of(sae.loss(sae.norm.normalise(faint))), batch_form)


def test_mistake_12_bfloat16_master_weights() -> None:
    sae = make("batchtopk").bfloat16()
    with pytest.raises(UserError, match="bfloat16"):
        sae.loss(sae.norm.normalise(activations(8)))
    sae = make("batchtopk")
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    train_step(sae, optimizer, activations(64).bfloat16())
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    moments = [value for moment in optimizer.state.values() for value in moment.values() if value.ndim]
    assert moments and {moment.dtype for moment in moments} == {torch.float32}
