"""python -m pytest tests/train/sae/test_losses.py: worked examples, float64 references, numerical derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import reference
from tests.helpers.cases import CASES, DEAD, Case, as_formula, perturbed, tokens
from tests.helpers.toy import activations, f_of, make
from train.sae import SAE, VARIANTS, TrainContext
from train.sae.sparse.backend import use_backend
from train.sae.sparse.cpu import CPUBackend

# Two tokens, two dimensions, three latents: the axes and a direction between them. Tokens (3, 1) and (1, 2) give
# z = (3, 1, 2.6) and (1, 2, 2.2); every case below is worked by hand with Vx = 4.
ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
X = torch.tensor([[3.0, 1.0], [1.0, 2.0]])


def worked(name: str, **settings: Any) -> SAE:
    sae = VARIANTS[name](2, 3, input_norm="none", **settings)
    with torch.no_grad():
        sae.W_enc.copy_(ROWS.t())
        sae.W_dec.copy_(ROWS)
        sae.variance.fill_(4.0)
        sae.mean_sq.fill_(1.0)
    return sae


def test_relu_bricken_by_hand() -> None:
    step = worked("relu", sparsity=0.1, form="bricken").loss(X)
    # x_hat (4.56, 3.08), (2.32, 3.76): squared errors 6.76 and 4.84. L1 6.6 and 5.2.
    assert step.metrics["nmse"].item() == pytest.approx((6.76 + 4.84) / 2 / 4)
    assert step.loss.item() == pytest.approx(1.45 + 0.1 * 5.9 / 2)
    assert step.metrics["l0"].item() == 3


def test_relu_april_by_hand() -> None:
    sae = worked("relu", sparsity=0.1)
    with torch.no_grad():
        sae.W_dec[2] *= 2  # norms 1, 1, 2
    step = sae.loss(X)
    # x_hat (6.12, 5.16), (3.64, 5.52): squared errors 27.04 and 19.36. sum f ||W||: 3 + 1 + 5.2 and 1 + 2 + 4.4.
    assert step.loss.item() == pytest.approx((27.04 + 19.36) / 2 / 4 + 0.1 * 8.3 / 2)


def test_topk_by_hand() -> None:
    step = worked("topk", k=1).loss(X)
    # (3, 0, 0) and (0, 0, 2.2): errors (0, -1) and (0.32, -0.24).
    assert f_of(step).tolist() == [[3, 0, 0], [0, 0, pytest.approx(2.2)]]
    assert step.loss.item() == pytest.approx((1 + 0.16) / 2 / 4)


def test_multi_topk_by_hand() -> None:
    sae = VARIANTS["topk"](2, 4, k=1, input_norm="none", multi_topk=True)
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([ROWS, torch.tensor([[-1.0, 0.0]])]))
        sae.W_enc.copy_(sae.W_dec.t())
        sae.variance.fill_(4.0)
    step = sae.loss(X)
    # The fourth z are -3 and -1: the four largest are those of ReLU, NMSE 1.45.
    assert step.loss.item() == pytest.approx(0.145 + 1.45 / 8)


def test_batchtopk_by_hand() -> None:
    step = worked("batchtopk", k=1).loss(X)
    # The two largest of all six, 3 and 2.6, are both the first token's: errors (1.56, 1.08) and (-1, -2).
    assert f_of(step).tolist() == [[3, 0, pytest.approx(2.6)], [0, 0, 0]]
    assert step.min_kept is not None and step.min_kept.item() == pytest.approx(2.6)
    assert step.loss.item() == pytest.approx((3.6 + 5) / 2 / 4)
    assert step.fired_F.tolist() == [True, False, True]


@pytest.mark.parametrize(("norm", "over"), [("variance", 4.0), ("residual", 4.01)])
def test_auxk_by_hand(norm: str, over: float) -> None:
    step = worked("batchtopk", k=1, auxk_norm=norm).loss(X, TrainContext(dead_F=torch.tensor([False, True, False])))
    # The dead latent offers (0, 1) and (0, 2) against residuals (-1.56, -1.08) and (1, 2): 6.76 and 1.
    # The residuals are (-1.28, -1.54) and (1.28, 1.54) about their mean: a variance of 1.6384 + 2.3716.
    assert step.metrics["auxk"].item() == pytest.approx((6.76 + 1) / 2 / over / 32)
    assert step.loss.item() == pytest.approx(1.075 + 3.88 / over / 32)


@pytest.mark.parametrize("batch", ["one token", "equal tokens", "reconstructed exactly"])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_auxk_is_bounded_where_a_batch_has_no_spread(name: str, batch: str) -> None:
    """Divided by a variance of next to nothing it was 1e8, and moved every weight by its rate."""
    sae = make(name)
    x = {"one token": activations(1), "equal tokens": activations(1).expand(64, -1)}.get(batch, activations(64))
    if batch == "reconstructed exactly":
        x = sae(x)
    loss = sae.loss(sae.norm.normalise(x), TrainContext(torch.arange(sae.width) % 2 == 0)).metrics["auxk"]
    assert 0 <= float(loss) < 32
    plain = sae.loss(sae.norm.normalise(activations(64)), TrainContext(torch.arange(sae.width) % 2 == 0))
    assert 0 < float(plain.metrics["auxk"]) < 1


def test_matryoshka_by_hand() -> None:
    step = worked("matryoshka", k=1, prefixes=[1 / 3, 1.0]).loss(X)
    # The first latent alone: (3, 0) and (0, 0), squared errors 1 and 5; the whole as for BatchTopK.
    assert step.loss.item() == pytest.approx((1 + 5) / 2 / 4 + 1.075)
    assert step.metrics["nmse"].item() == pytest.approx(1.075)


def test_gated_by_hand() -> None:
    sae = worked("gated", sparsity=0.1)
    with torch.no_grad():
        sae.get_parameter("b_gate").copy_(torch.tensor([-2.0, 0.0, -2.5]))
        sae.get_parameter("r_mag").copy_(torch.tensor([2.0, 1.0, 1.0]).log())
        sae.get_parameter("b_mag").copy_(torch.tensor([-1.0, -2.0, 0.0]))
    step = sae.loss(X)
    # pi (1, 1, 0.1), (-1, 2, -0.3); mag (5, -1, 2.6), (1, 0, 2.2): f (5, 0, 2.6), 0. Errors (3.56, 1.08), (-1, -2).
    assert f_of(step).tolist() == [[5, 0, pytest.approx(2.6)], [0, 0, 0]]
    assert step.metrics["nmse"].item() == pytest.approx((13.84 + 5) / 2 / 4)
    assert step.metrics["sparsity"].item() == pytest.approx(0.1 * (2.1 + 2) / 2 / 2)
    # relu(pi) decodes to (1.06, 1.08) and (0, 2): errors (-1.94, 0.08) and (-1, 0).
    assert step.metrics["auxiliary"].item() == pytest.approx((3.77 + 1) / 2 / 4)
    assert step.loss.item() == pytest.approx(3.05375)


def test_jumprelu_by_hand() -> None:
    sae = worked("jumprelu", sparsity=0.1, bandwidth=0.4)
    with torch.no_grad():
        sae.get_parameter("theta").copy_(torch.tensor([2.0, 2.1, 2.5]))
    step = sae.loss(X)
    step.loss.backward()
    # f (3, 0, 2.6) and 0, as for BatchTopK; one latent a token on average.
    assert step.loss.item() == pytest.approx(1.075 + 0.1)
    # Within eps / 2 = 0.2 of theta: z = 2 of the second latent (second token, dL/df = -0.5), z = 2.6 of the third
    # (first token, dL/df = 0.39 * 0.6 + 0.27 * 0.8 = 0.45). The penalty gives each -0.1 / 0.4 / 2 = -0.125.
    wanted = [0, 2.1 / 0.4 * 0.5 - 0.125, -2.5 / 0.4 * 0.45 - 0.125]
    assert sae.get_parameter("theta").grad is not None
    assert sae.get_parameter("theta").grad.tolist() == pytest.approx(wanted, rel=1e-5)  # type: ignore[union-attr]


def test_jumprelu_target_by_hand() -> None:
    sae = worked("jumprelu", sparsity=0.1, target_l0=2.0)
    with torch.no_grad():
        sae.get_parameter("theta").copy_(torch.tensor([2.0, 2.1, 2.5]))
    assert sae.loss(X, TrainContext(sparsity_scale=0.5)).metrics["sparsity"].item() == pytest.approx(0.5 * 0.1 * 0.25)


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient_equal_the_float64_reference(case: Case, centred: bool) -> None:
    sae, x = perturbed(case, centred), tokens()
    parameters = as_formula({name: p.detach().numpy().copy() for name, p in sae.named_parameters()})
    options = case.options | ({"dead": DEAD} if case.uses_dead else {})
    loss, grads = case.compute(x.numpy(), parameters, 2.5, centred, **options)
    step = sae.loss(x, TrainContext(dead_F=torch.from_numpy(DEAD)))
    step.loss.backward()
    assert step.loss.item() == pytest.approx(loss, rel=1e-12)
    found = {name: p.grad.numpy() for name, p in sae.named_parameters() if p.grad is not None}
    assert len(found) == len(parameters)
    for name, grad in as_formula(found).items():
        np.testing.assert_allclose(grad, grads[name], rtol=1e-9, atol=1e-12, err_msg=name)
        assert np.abs(grads[name]).max() > 1e-4, f"the case does not exercise {name}"


def test_auxk_is_the_same_where_so_many_are_dead_that_z_is_selected() -> None:
    case = Case("batchtopk", {"k": 3}, reference.batchtopk, {"k": 3})
    sae, x = perturbed(case, True), tokens()
    parameters = as_formula({name: p.detach().numpy().copy() for name, p in sae.named_parameters()})
    with use_backend(CPUBackend(dense_dead=0)):
        step = sae.loss(x, TrainContext(dead_F=torch.from_numpy(DEAD)))
    step.loss.backward()
    loss, grads = case.compute(x.numpy(), parameters, 2.5, True, dead=DEAD, **case.options)
    assert step.loss.item() == pytest.approx(loss, rel=1e-12)
    assert sae.W_enc_FD.grad is not None
    np.testing.assert_allclose(sae.W_enc_FD.grad.numpy().T, grads["W_enc"], rtol=1e-9, atol=1e-12)


class Loss(nn.Module):
    """The loss as a forward, so that torch.func can swap the parameters."""

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        return self.sae.loss(x).loss


# What the loss is a true function of: not what a pseudo-derivative or a detached copy stands for.
PSEUDO = {"jumprelu": {"theta"}, "gated": {"W_dec", "b_dec"}}


@pytest.mark.parametrize("case", [case for case in CASES if "auxk" not in str(case)], ids=str)
def test_true_derivatives_equal_finite_differences(case: Case) -> None:
    sae = perturbed(case, centred=True)
    free = [name for name, _ in sae.named_parameters() if name not in PSEUDO.get(case.name, set())]

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        swapped = {f"sae.{name}": value for name, value in zip(free, values, strict=True)}
        found = torch.func.functional_call(Loss(sae), swapped, (x,))
        assert isinstance(found, Tensor)
        return found

    values = [sae.get_parameter(name).detach().clone().requires_grad_() for name in free]
    x = tokens()[:4].requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, *values), eps=1e-7, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu"])
def test_sparsity_scale_multiplies_the_penalty_alone(name: str) -> None:
    sae = perturbed(Case(name, {"sparsity": 0.3}, reference.relu), True)
    x = tokens()
    whole, half, none = (sae.loss(x, TrainContext(sparsity_scale=scale)) for scale in (1.0, 0.5, 0.0))
    assert none.metrics["sparsity"] == 0
    assert half.metrics["sparsity"].item() == pytest.approx(whole.metrics["sparsity"].item() / 2)
    assert (whole.loss - none.loss).item() == pytest.approx(whole.metrics["sparsity"].item())


def test_without_l0_gradient_jumprelu_trains_theta_through_the_reconstruction_only() -> None:
    case = Case("jumprelu", {"sparsity": 0.0, "bandwidth": 0.4}, reference.jumprelu, {"sparsity": 0.0, "eps": 0.8})
    sae, x = perturbed(case, True), tokens()
    sae.loss(x).loss.backward()
    parameters = as_formula({name: p.detach().numpy() for name, p in sae.named_parameters()})
    wanted = reference.jumprelu(x.numpy(), parameters, 2.5, True, sparsity=0.0, eps=0.8)[1]["theta"]
    grad = sae.get_parameter("theta").grad
    assert grad is not None
    np.testing.assert_allclose(grad.numpy(), wanted, rtol=1e-9)
