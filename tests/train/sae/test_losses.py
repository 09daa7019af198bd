"""python -m pytest tests/train/sae/test_losses.py: worked examples, float64 references, numerical derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import reference
from tests.helpers.toy import f_of
from train.sae import SAE, VARIANTS
from train.sae.variants.batchtopk import BatchTopKBase

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
    assert step.parts["nmse"].item() == pytest.approx((6.76 + 4.84) / 2 / 4)
    assert step.loss.item() == pytest.approx(1.45 + 0.1 * 5.9 / 2)
    assert step.parts["l0"].item() == 3


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
    assert step.parts["min_kept"].item() == pytest.approx(2.6)
    assert step.loss.item() == pytest.approx((3.6 + 5) / 2 / 4)
    assert step.fired_F.tolist() == [True, False, True]


def test_auxk_by_hand() -> None:
    step = worked("batchtopk", k=1).loss(X, dead_F=torch.tensor([False, True, False]))
    # The dead latent offers (0, 1) and (0, 2) against residuals (-1.56, -1.08) and (1, 2): 6.76 and 1.
    assert step.parts["auxk"].item() == pytest.approx((6.76 + 1) / 2 / 4 / 32)
    assert step.loss.item() == pytest.approx(1.075 + 0.97 / 32)


def test_matryoshka_by_hand() -> None:
    step = worked("matryoshka", k=1, prefixes=[1 / 3, 1.0]).loss(X)
    # The first latent alone: (3, 0) and (0, 0), squared errors 1 and 5; the whole as for BatchTopK.
    assert step.loss.item() == pytest.approx((1 + 5) / 2 / 4 + 1.075)
    assert step.parts["nmse"].item() == pytest.approx(1.075)


def test_gated_by_hand() -> None:
    sae = worked("gated", sparsity=0.1)
    with torch.no_grad():
        sae.get_parameter("b_gate").copy_(torch.tensor([-2.0, 0.0, -2.5]))
        sae.get_parameter("r_mag").copy_(torch.tensor([2.0, 1.0, 1.0]).log())
        sae.get_parameter("b_mag").copy_(torch.tensor([-1.0, -2.0, 0.0]))
    step = sae.loss(X)
    # pi (1, 1, 0.1), (-1, 2, -0.3); mag (5, -1, 2.6), (1, 0, 2.2): f (5, 0, 2.6), 0. Errors (3.56, 1.08), (-1, -2).
    assert f_of(step).tolist() == [[5, 0, pytest.approx(2.6)], [0, 0, 0]]
    assert step.parts["nmse"].item() == pytest.approx((13.84 + 5) / 2 / 4)
    assert step.parts["sparsity"].item() == pytest.approx(0.1 * (2.1 + 2) / 2 / 2)
    # relu(pi) decodes to (1.06, 1.08) and (0, 2): errors (-1.94, 0.08) and (-1, 0).
    assert step.parts["auxiliary"].item() == pytest.approx((3.77 + 1) / 2 / 4)
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
    sae = worked("jumprelu", sparsity=0.1, k=2.0)
    with torch.no_grad():
        sae.get_parameter("theta").copy_(torch.tensor([2.0, 2.1, 2.5]))
    assert sae.loss(X, sparsity_scale=0.5).parts["sparsity"].item() == pytest.approx(0.5 * 0.1 * 0.25)


# Against the references. B = 12 tokens, D = 8, F = 24.

DEAD = np.arange(24) % 3 == 0  # 8 dead latents, and k_aux = 4


@dataclass
class Case:
    name: str
    settings: dict[str, Any]
    compute: Callable[..., reference.Result]
    options: dict[str, Any] = field(default_factory=dict)
    uses_dead: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


def topk_cases() -> list[Case]:
    aux = [
        ({}, {}),
        ({"auxk_relu": True}, {"relu": True}),
        ({"auxk_norm": "residual"}, {"by_residual": True}),
        ({"auxk_alpha": 0.5}, {"alpha": 0.5}),
        ({"auxk_k": 2}, {"k_aux": 2}),
        ({"auxk_over": "batch"}, {"over_batch": True}),
    ]
    sizes = {"batchtopk": (None,), "matryoshka": (3, 12, 24)}
    prefixes = {"matryoshka": {"prefixes": [1 / 8, 1 / 2, 1.0]}}
    cases = [Case("topk", {"k": 3, **s}, reference.topk, {"k": 3, **o}, True) for s, o in aux]
    cases.append(Case("topk", {"k": 3, "multi_topk": True}, reference.topk, {"k": 3, "multi": True}, True))
    for name, nested in sizes.items():
        for s, o in aux:
            settings = {"k": 3, **prefixes.get(name, {}), **s}
            cases.append(Case(name, settings, reference.batchtopk, {"k": 3, "sizes": nested, **o}, True))
        settings = {"k": 3, **prefixes.get(name, {}), "selection": "quantile"}
        cases.append(Case(name, settings, reference.batchtopk, {"k": 3, "sizes": nested, "threshold": 0.75}, True))
    return cases


CASES = [
    Case("relu", {"sparsity": 0.3, "form": "april"}, reference.relu, {"sparsity": 0.3, "form": "april"}),
    Case("relu", {"sparsity": 0.3, "form": "bricken"}, reference.relu, {"sparsity": 0.3, "form": "bricken"}),
    *topk_cases(),
    Case("gated", {"sparsity": 0.3}, reference.gated, {"sparsity": 0.3}),
    Case("jumprelu", {"sparsity": 0.3, "bandwidth": 0.4}, reference.jumprelu, {"sparsity": 0.3, "eps": 0.8}),
    Case(
        "jumprelu",
        {"sparsity": 0.3, "bandwidth": 0.4, "k": 5.0},
        reference.jumprelu,
        {"sparsity": 0.3, "eps": 0.8, "target": 5.0},
    ),
]


def perturbed(case: Case, centred: bool) -> SAE:
    """In float64, with nothing at a special value: biases, rows that are not unit, Vx = 2.5, E||x'||^2 = 4."""
    sae = VARIANTS[case.name](8, 24, input_norm="none", apply_b_dec_to_input=centred, **case.settings).double()
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
            if name == "theta":
                parameter.abs_()
        sae.variance.fill_(2.5)
        sae.mean_sq.fill_(4.0)
        if isinstance(sae, BatchTopKBase):
            sae.threshold.fill_(0.75)
    return sae


def tokens() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def as_formula(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters or gradients by the formula's names and shapes."""
    return {"W_enc" if name == "W_enc_FD" else name: a.T if name == "W_enc_FD" else a for name, a in parts.items()}


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "uncentred"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient_equal_the_float64_reference(case: Case, centred: bool) -> None:
    sae, x = perturbed(case, centred), tokens()
    parameters = as_formula({name: p.detach().numpy().copy() for name, p in sae.named_parameters()})
    options = case.options | ({"dead": DEAD} if case.uses_dead else {})
    loss, grads = case.compute(x.numpy(), parameters, 2.5, centred, **options)
    step = sae.loss(x, dead_F=torch.from_numpy(DEAD))
    step.loss.backward()
    assert step.loss.item() == pytest.approx(loss, rel=1e-12)
    found = {name: p.grad.numpy() for name, p in sae.named_parameters() if p.grad is not None}
    assert len(found) == len(parameters)
    for name, grad in as_formula(found).items():
        np.testing.assert_allclose(grad, grads[name], rtol=1e-9, atol=1e-12, err_msg=name)
        assert np.abs(grads[name]).max() > 1e-4, f"the case does not exercise {name}"


@pytest.mark.parametrize("over", ["token", "batch"])
def test_auxk_is_the_same_where_so_many_are_dead_that_z_is_selected(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("batchtopk", {"k": 3, "auxk_over": over}, reference.batchtopk, {"k": 3, "over_batch": over == "batch"})
    sae, x = perturbed(case, True), tokens()
    parameters = as_formula({name: p.detach().numpy().copy() for name, p in sae.named_parameters()})
    monkeypatch.setattr("train.sae.parts.auxk._HELD", 0)
    step = sae.loss(x, dead_F=torch.from_numpy(DEAD))
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
    whole, half, none = (sae.loss(x, sparsity_scale=scale) for scale in (1.0, 0.5, 0.0))
    assert none.parts["sparsity"] == 0
    assert half.parts["sparsity"].item() == pytest.approx(whole.parts["sparsity"].item() / 2)
    assert (whole.loss - none.loss).item() == pytest.approx(whole.parts["sparsity"].item())


def test_without_l0_gradient_jumprelu_trains_theta_through_the_reconstruction_only() -> None:
    case = Case("jumprelu", {"sparsity": 0.0, "bandwidth": 0.4}, reference.jumprelu, {"sparsity": 0.0, "eps": 0.8})
    sae, x = perturbed(case, True), tokens()
    sae.loss(x).loss.backward()
    parameters = as_formula({name: p.detach().numpy() for name, p in sae.named_parameters()})
    wanted = reference.jumprelu(x.numpy(), parameters, 2.5, True, sparsity=0.0, eps=0.8)[1]["theta"]
    grad = sae.get_parameter("theta").grad
    assert grad is not None
    np.testing.assert_allclose(grad.numpy(), wanted, rtol=1e-9)
