"""python -m pytest tests/train/sae/variants/test_auxk_norm.py: what AuxK is divided by."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.toy import F, activations, make
from train.sae import TrainContext

DEAD_F = torch.arange(F) >= F // 2


def auxk(x_BD: torch.Tensor) -> float:
    sae = make("topk")
    return float(sae.loss(sae.norm.normalise(x_BD), TrainContext(dead_F=DEAD_F)).metrics["auxk"])


def test_it_is_the_residual_s_own_variance_by_default() -> None:
    x_BD, by_residual, by_x = activations(256), make("topk"), make("topk", auxk_norm="variance")
    xn_BD = by_x.norm.normalise(x_BD)
    steps = [sae.loss(xn_BD, TrainContext(dead_F=DEAD_F)) for sae in (by_residual, by_x)]
    residual_BD = (xn_BD - steps[0].xn_hat_BD).double()
    ratio = by_x.variance / residual_BD.var(0, correction=0).sum()
    assert float(steps[0].metrics["auxk"] / steps[1].metrics["auxk"]) == pytest.approx(float(ratio), rel=1e-4)


def test_a_batch_of_like_tokens_does_not_drown_the_loss() -> None:
    assert 0 < auxk(activations(1).repeat(256, 1)) < 10  # without a floor 1e6
