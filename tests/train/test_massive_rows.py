"""python -m pytest tests/train/test_massive_rows.py: what a planted sink does to a BatchTopK, and the default's answer.

One row in 64 is massive, 270 times the median norm, in one dimension. k is 4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.loading.loader import ActivationLoader
from data.loading.reader import open_reader
from data.store.manifest import HELDOUT
from tests.helpers.runs import SITE, make_store
from train.run import train
from train.sae.base import SAE
from train.sae.io import load

LIMIT = 1000.0  # the massive rows have a norm of 4,000, the others one near 15


def heldout(settings: Any, tmp_path: Path) -> tuple[Tensor, Tensor]:
    """The ordinary and the massive held-out rows, in float32."""
    store = make_store(tmp_path / "cache", settings, sink_every=64)
    loader = ActivationLoader(open_reader(store, HELDOUT, SITE), batch=64, shuffle=False, drop_last=False)
    x_ND = torch.cat([batch.float() for batch in loader])
    massive_N = x_ND.norm(dim=1) > LIMIT
    return x_ND[~massive_N], x_ND[massive_N]


def active(sae: SAE, x_ND: Tensor) -> Tensor:
    """L0 of each row in the inference form."""
    return (sae.encode(x_ND) > 0).sum(1).float()


def nmse(sae: SAE, x_ND: Tensor) -> float:
    """The squared error over the variance."""
    with torch.no_grad():
        error_ND = x_ND.double() - sae(x_ND).double()
    return float(error_ND.square().sum() / (x_ND.double() - x_ND.double().mean(0)).square().sum())


def test_a_batchtopk_spends_its_latents_on_massive_rows_unless_they_are_left_out(short: Any, tmp_path: Path) -> None:
    settings = short("sae=batchtopk", "tokens=3200", f"cache={tmp_path / 'cache'}")
    ordinary_ND, massive_ND = heldout(settings, tmp_path)
    train({**settings, "outliers": None, "out": str(tmp_path / "all")})
    train(settings)
    of_all, spared = load(tmp_path / "all"), load(tmp_path / "run")
    # A sink has most of the 64 latents to itself, which the ordinary rows are short of.
    assert active(of_all, massive_ND).mean() > 32 and active(of_all, ordinary_ND).mean() < 4
    assert active(spared, ordinary_ND).mean() == pytest.approx(4, rel=0.15)
    # Over all rows that SAE reads as nearly perfect; on ordinary ones it is worse than their mean.
    assert nmse(of_all, torch.cat([ordinary_ND, massive_ND])) < 0.05
    assert nmse(of_all, ordinary_ND) > 1
    assert nmse(spared, ordinary_ND) < 0.25
