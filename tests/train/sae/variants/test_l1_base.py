"""python -m pytest tests/train/sae/variants/test_l1_base.py: a coefficient that follows the wanted L0."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from data.base.errors import UserError
from tests.helpers.toy import activations, make
from train.sae import SAE, VARIANTS, StepOutput, TrainContext


def step_at(sae: SAE, l0: float, sparsity_scale: float = 1.0, settled: float = 1.0) -> StepOutput:
    """A training step's report of a mean L0."""
    xn = sae.norm.normalise(activations(8))
    step = sae.loss(xn, TrainContext(sparsity_scale=sparsity_scale, settled=settled))
    return replace(step, metrics=step.metrics | {"l0": torch.tensor(l0)})


@pytest.mark.parametrize("form", ["relu at k", "gated at k"])
def test_the_factor_moves_by_the_logarithm_of_the_ratio(form: str) -> None:
    sae = make(form)
    sae.after_step(step_at(sae, 15.0))
    assert float(sae.sparsity_factor) == pytest.approx(math.exp(0.1 * math.log(1.5)))
    sae.after_step(step_at(sae, 10 / 1.5))
    assert float(sae.sparsity_factor) == pytest.approx(1.0)
    sae.after_step(step_at(sae, 0.0))
    assert float(sae.sparsity_factor) == pytest.approx(math.exp(-0.1))


@pytest.mark.parametrize(("settled", "rate"), [(0.0, 0.0025), (0.5, math.sqrt(0.0025 * 0.1)), (1.0, 0.1)])
def test_it_follows_slowly_at_first(settled: float, rate: float) -> None:
    sae = make("gated at k")
    sae.after_step(step_at(sae, 15.0, settled=settled))
    assert float(sae.sparsity_factor) == pytest.approx(math.exp(rate * math.log(1.5)))


def test_it_waits_for_the_warm_up() -> None:
    sae = make("relu at k")
    sae.after_step(step_at(sae, 60.0, sparsity_scale=0.5))
    assert float(sae.sparsity_factor) == 1.0


def test_the_factor_multiplies_the_term() -> None:
    sae, xn = make("relu at k"), activations(16)
    before = sae.loss(xn)
    sae.sparsity_factor.fill_(3.0)
    after = sae.loss(xn)
    assert float(after.metrics["sparsity"]) == pytest.approx(3 * float(before.metrics["sparsity"]))
    assert float((after.loss - before.loss).detach()) == pytest.approx(2 * float(before.metrics["sparsity"]), rel=1e-4)


def test_without_k_it_stays() -> None:
    sae = make("relu")
    sae.after_step(step_at(sae, 60.0))
    assert float(sae.sparsity_factor) == 1.0


@pytest.mark.parametrize(("sparsity", "k"), [(0.0, 4), (0.1, 0), (0.1, 65)])
def test_a_wanted_l0_that_cannot_be_met_is_refused(sparsity: float, k: int) -> None:
    with pytest.raises(UserError, match=f"target_l0={k} .*fix one of them"):
        VARIANTS["gated"](16, 64, sparsity=sparsity, target_l0=k)
