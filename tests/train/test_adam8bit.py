"""Adam with moments of 8 bits: what it holds, how near it comes, and that a run goes on to the bit.

Needs the extra: .venv/bin/pip install -e ".[adam8bit]"
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.memory import MOMENTS
from tests.helpers.runs import Broken, assert_same, assert_same_sae, break_after, final_state
from train.config import OptimizerSettings
from train.optimizers import optimizer_from
from train.run import train
from train.sae import load_config

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no extra adam8bit")
WIDE = ("sae=topk", "sae.expansion=null", "sae.width=512", "optimizer.name=adam8bit")  # 8,192 entries a matrix


def test_its_moments_take_two_bytes_an_entry() -> None:
    weight = torch.nn.Parameter(torch.zeros(1024, 64))
    optimizer = optimizer_from(OptimizerSettings.of({"name": "adam8bit", "lr": 1e-3, "fused": True}))([weight])
    weight.grad = torch.randn(1024, 64)
    optimizer.step()
    # Beside them each parameter names two tables of 256 values, which all share.
    parts = {name: value for name, value in optimizer.state[weight].items() if isinstance(value, Tensor)}
    held = sum(value.nbytes for name, value in parts.items() if not name.startswith("qmap"))
    assert held == weight.numel() * MOMENTS["adam8bit"]


@pytest.mark.slow
def test_a_run_ends_near_that_of_adam_and_says_what_trained_it(short: Any, tmp_path: Path) -> None:
    nmse = {}
    for name in ("adam8bit", "adam"):
        train(short(*WIDE[:-1], f"optimizer.name={name}", f"out={tmp_path / name}"))
        training = load_config(tmp_path / name)["training"]
        nmse[name] = training["heldout"]["nmse"]
        assert training["optimizer"]["name"] == {"adam8bit": "Adam8bit", "adam": "Adam"}[name]
    assert nmse["adam8bit"] != nmse["adam"]
    assert nmse["adam8bit"] == pytest.approx(nmse["adam"], rel=0.05)


def test_continued_equals_uninterrupted(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(short(*WIDE, f"out={tmp_path / 'whole'}"))
    settings = short(*WIDE, f"out={tmp_path / 'broken'}", "checkpoint_every=7")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 7)
        train(settings)
    moments = [value for name, value in final_state(tmp_path / "broken").items() if "/state1" in name]
    assert {value.dtype for value in moments} == {torch.uint8, torch.float32}  # the biases are too short for 8 bits
    train(settings)
    assert_same(final_state(tmp_path / "broken"), final_state(tmp_path / "whole"))
    assert_same_sae(tmp_path / "broken", tmp_path / "whole")
