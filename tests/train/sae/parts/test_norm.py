"""python -m pytest tests/train/sae/test_norm.py"""

from __future__ import annotations

import pytest
import torch

from data.base.errors import UserError
from train.sae.parts.norm import NORM_KINDS, InputNorm


def test_dataset_by_hand() -> None:
    norm = InputNorm("dataset", 2)
    norm.fit(12.5)  # the rows below: (25 + 0) / 2
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert norm.scale.item() == pytest.approx(0.4)
    xn = norm.normalise(x)
    torch.testing.assert_close(xn, torch.tensor([[1.2, 1.6], [0.0, 0.0]]))
    assert xn.square().sum(1).mean().item() == pytest.approx(2)  # E||x'||^2 = D


def test_token_by_hand() -> None:
    norm = InputNorm("token", 3).double()
    x = torch.tensor([[1.0, 2.0, 6.0], [-5.0, -5.0, -5.0]], dtype=torch.float64)
    # Mean 3, deviations -2, -1, 3, ddof 1: std sqrt(14 / 2). A constant token has std 0 and becomes 0.
    wanted = torch.tensor([[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64) / (7**0.5 + 1e-5)
    torch.testing.assert_close(norm.normalise(x), wanted, rtol=1e-12, atol=0)


def test_none_is_the_identity_in_float32() -> None:
    norm = InputNorm("none", 2)
    norm.fit(100.0)
    x = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    assert torch.equal(norm.normalise(x), x.float())


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_the_way_back(kind: str) -> None:
    norm = InputNorm(kind, 5)
    x = 30 * torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) + 7
    norm.fit(float(x.square().sum(1).mean()))
    torch.testing.assert_close(norm.denormalise(norm.normalise(x), x), x)


@pytest.mark.parametrize("kind", NORM_KINDS)
def test_the_scale_is_state(kind: str) -> None:
    norm = InputNorm(kind, 4)
    norm.fit(16.0)
    assert norm.state_dict()["scale"].item() == (0.5 if kind == "dataset" else 1)


def test_what_cannot_be_normalised_is_refused() -> None:
    with pytest.raises(UserError, match="none, dataset, token"):
        InputNorm("layer", 4)
    with pytest.raises(UserError, match="width of at least 2"):
        InputNorm("token", 1)
