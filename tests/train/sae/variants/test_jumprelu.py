"""python -m pytest tests/train/sae/variants/test_jumprelu.py: an L0 that is asked for."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from data.base.errors import UserError
from tests.helpers.toy import D, F, activations, make, train
from train.sae import SAE, VARIANTS
from train.sae_trainer import SAETrainer
from train.schedules import Schedule

K = 3.0


def targeted(**settings: object) -> SAE:
    sae = VARIANTS["jumprelu"](D, F, target_l0=K, **settings)
    sae.initialise(activations(2048))
    return sae


def mean_l0(sae: SAE) -> float:
    with torch.no_grad():
        return float((sae.encode(activations(4096, seed=7)) > 0).sum(1).double().mean())


def test_it_starts_at_twice_the_target() -> None:
    assert mean_l0(targeted()) == pytest.approx(2 * K, rel=0.1)


def test_a_given_threshold_and_the_paper_s_form_start_where_the_paper_does() -> None:
    for sae in (targeted(target_form="square"), targeted(initial_threshold=0.001), make("jumprelu")):
        assert torch.equal(sae.theta.detach(), torch.full((F,), 0.001 * float(sae.mean_sq.sqrt())))


@pytest.mark.parametrize(
    ("target", "ratio", "penalty"),
    [
        ("log", 2.5, 3 * math.log(2.5) ** 2),
        ("log", 0.5, 3 * 0.25),
        ("square", 2.5, 0.3 * 1.5**2),
        ("square", 0.5, 0.3 * 0.25),
    ],
)
def test_the_penalty_of_an_l0(target: str, ratio: float, penalty: float) -> None:
    sae, xn = make("jumprelu"), activations(64)
    l0 = float(sae.loss(sae.norm.normalise(xn)).metrics["l0"])
    aimed = VARIANTS["jumprelu"](D, F, target_l0=l0 / ratio, target_form=target)
    aimed.load_state_dict(sae.state_dict())
    assert float(aimed.loss(aimed.norm.normalise(xn)).metrics["sparsity"]) == pytest.approx(penalty, rel=1e-5)


@pytest.mark.slow
def test_it_ends_near_the_target() -> None:
    """In 300 steps at a constant rate; the paper's form, from a dense start, is not there by then."""
    sae, paper = targeted(), targeted(target_form="square", initial_threshold=0.001)
    for one in (sae, paper):
        train(one, 300, batch=256)
    assert mean_l0(sae) == pytest.approx(K, rel=0.05)
    assert mean_l0(paper) > 1.08 * K


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UserError, match="target_form=cube is not allowed"):
        targeted(target_form="cube")


@pytest.mark.parametrize(("d_in", "share"), [(16, 0.3), (192, 0.3), (576, 0.9), (640, 1.0)])
def test_theta_s_share_of_the_rate_rises_with_the_width_above_192(d_in: int, share: float) -> None:
    sae = VARIANTS["jumprelu"](d_in, 32, target_l0=4)
    assert sae.rate_shares == pytest.approx({} if share == 1 else {"theta": share})


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_theta_takes_its_share_of_the_rate(share: float) -> None:
    """Adam's first step is the rate for every entry whose gradient is not zero."""
    sae = targeted(theta_rate=share, bandwidth=0.05)
    theta, b_enc = sae.theta.detach().clone(), sae.bias_F.detach().clone()
    schedule = Schedule(total=10, lr_warmup=0, lr_decay=0, sparsity_warmup=0)
    optimizer = partial(torch.optim.Adam, lr=1e-3, eps=1e-20)
    trainer = SAETrainer(
        sae, optimizer, schedule, folder=Path("nowhere"), name="x", seed=0, dead_after=10**6, clip=None
    )
    trainer.training_step(activations(256))
    assert float((sae.theta.detach() - theta).abs().max()) == pytest.approx(share * 1e-3, rel=1e-2)
    assert float((sae.bias_F.detach() - b_enc).abs().max()) == pytest.approx(1e-3, rel=1e-2)
