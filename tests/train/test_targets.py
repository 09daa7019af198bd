"""python -m pytest tests/train/test_targets.py: what a run says of an L0 that it missed."""

from __future__ import annotations

from typing import Any

import pytest

from train.run import train
from train.targets import l0_miss


@pytest.mark.parametrize("l0", [7.8, 8.0, 8.2])
def test_nothing_within_three_per_cent(l0: float) -> None:
    assert l0_miss("jumprelu", 8, l0, trained=l0) is None


@pytest.mark.parametrize(
    ("variant", "trained", "given", "advice"),
    [
        ("jumprelu", 14.2, {}, "larger sae.sparsity"),
        ("gated", 14.2, {"coefficient": 0.4321}, "sae.sparsity=0.43"),
        ("gated", 8.1, {"coefficient": 0.4321}, "8.1 on the last training batch, so the held-out text differs"),
        ("batchtopk", 8.01, {"calibrated": True}, "8.0 on the calibration rows, so the held-out text differs"),
        ("batchtopk", 5.0, {"calibrated": True}, "lower sae.k"),
    ],
)
def test_it_says_what_to_do(variant: str, trained: float, given: dict[str, Any], advice: str) -> None:
    line = l0_miss(variant, 8, 14.5, trained=trained, **given)
    assert line is not None and "asked for an L0 of 8, got 14.5" in line and advice in line


def test_a_long_way_of_calibration_is_said_though_the_target_is_met() -> None:
    line = l0_miss("jumprelu", 8, 8.1, trained=8.0, calibrated=True, before=14.5)
    assert line is not None
    assert "asked for an L0 of 8, training ended at 14.5 and calibration brought it to 8.1" in line
    assert "train longer" in line
    assert l0_miss("jumprelu", 8, 8.1, trained=8.0, calibrated=True, before=8.6) is None


def test_a_run_ends_with_it(short: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(short("sae=relu", "sae.k=2", "sparsity_warmup=1"))  # too short a run to get there
    assert "relu: asked for an L0 of 2, training ended at" in capsys.readouterr().err
