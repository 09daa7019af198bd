"""The probe's optimum against its definition: no gradient is left, no other weight is better."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate.feature_metrics.logistic import RIDGE, cross_entropy, fit_logistic


def gradient(z: np.ndarray, y: np.ndarray, weight: float, bias: float) -> tuple[float, float]:
    """Of the mean cross-entropy with the ridge on the weight of standardised z, in float64 from the formula."""
    residual = 1 / (1 + np.exp(-(weight * z + bias))) - y
    u = (z - z.mean()) / z.std()
    return float((residual * u).mean() + RIDGE * weight * z.std()), float(residual.mean())


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 1e4]), rate=st.floats(0.02, 0.98))
@settings(max_examples=25)
def test_no_gradient_is_left(seed: int, scale: float, rate: float) -> None:
    rng = np.random.default_rng(seed)
    z = rng.standard_t(2, (300, 5)) * scale + 3 * scale  # heavy tails, on which plain Newton steps overshoot
    y = (rng.random(300) < rate).astype(float)
    y[:2] = [0, 1]
    found = fit_logistic(torch.from_numpy(z), torch.from_numpy(y))
    for column in range(5):
        left = gradient(z[:, column], y, float(found.weight_C[column]), float(found.bias_C[column]))
        assert max(map(abs, left)) < 3e-8  # where float64 no longer sees a gain


def test_single_precision_chooses_as_double_does() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2000, 40, generator=g, dtype=torch.float64)
    y = (z @ torch.randn(40, generator=g, dtype=torch.float64) > 4).double()
    exact, fast = fit_logistic(z, y), fit_logistic(z.float(), y.float())
    torch.testing.assert_close(fast.loss_C.double(), exact.loss_C, rtol=1e-5, atol=0)
    assert int(fast.loss_C.argmin()) == int(exact.loss_C.argmin())


def test_a_constant_and_a_noise_are_worth_the_base_rate_and_worked_by_hand() -> None:
    # Of z in {0, 1} the best probe is the two groups' own rates: 1/4 and 3/4, so log 4 - (3/4) log 3 on each token.
    z = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
    y = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0], dtype=torch.float64)
    found = fit_logistic(torch.stack([z, torch.full_like(z, 7)], 1), y)
    assert float(found.loss_C[0]) == pytest.approx(math.log(4) - 0.75 * math.log(3), rel=1e-5)
    assert float(found.weight_C[0]) == pytest.approx(2 * math.log(3), rel=1e-4)
    assert float(found.loss_C[1]) == pytest.approx(math.log(2)) and float(found.weight_C[1]) == 0


def test_labels_that_a_threshold_parts_have_a_finite_probe() -> None:
    z = torch.linspace(-1, 1, 100, dtype=torch.float64)[:, None]
    found = fit_logistic(z, (z[:, 0] > 0).double())
    assert bool(found.weight_C.isfinite()) and 0 < float(found.loss_C) < 1e-2 and float(found.gradient_C) < 1e-9


def test_cross_entropy_is_the_logarithm_of_the_chance() -> None:
    eta = torch.tensor([[0.3], [-60.0], [60.0]], dtype=torch.float64)
    got = cross_entropy(eta, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))[:, 0]
    assert got.tolist() == pytest.approx([math.log1p(math.exp(-0.3)), 60, 0], abs=1e-12)
