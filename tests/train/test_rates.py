"""python -m pytest tests/train/test_rates.py: the rate of a run that names none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from data.base.errors import UserError
from train.rates import AT_64, learning_rate
from train.run import train
from train.sae import VARIANTS, load_config


def test_every_variant_has_a_rate() -> None:
    assert AT_64.keys() == VARIANTS.keys()


@pytest.mark.parametrize("variant", sorted(AT_64.keys() - {"jumprelu"}))
def test_it_falls_with_the_square_root_of_the_width(variant: str) -> None:
    assert learning_rate(variant, 64, 1000) == pytest.approx(AT_64[variant])
    assert learning_rate(variant, 768, 1000) == pytest.approx(AT_64[variant] / math.sqrt(12), rel=0.005)


def test_jumprelu_s_falls_with_the_width_up_to_192() -> None:
    at_64 = learning_rate("jumprelu", 64, 1000)
    assert learning_rate("jumprelu", 192, 1000) == pytest.approx(at_64 / 3, rel=0.005)
    assert learning_rate("jumprelu", 768, 1000) == pytest.approx(at_64 / 6, rel=0.005)


def test_it_falls_with_the_cube_root_of_the_steps_but_not_below_400() -> None:
    assert learning_rate("batchtopk", 768, 8000) == pytest.approx(learning_rate("batchtopk", 768, 1000) / 2, rel=0.005)
    assert learning_rate("batchtopk", 768, 500) > learning_rate("batchtopk", 768, 1000)
    assert learning_rate("batchtopk", 768, 30) == learning_rate("batchtopk", 768, 400)


@pytest.mark.parametrize(
    ("variant", "d_in", "steps", "theirs"),
    [("batchtopk", 768, 244_140, 3e-4), ("gated", 2560, 244_140, 3e-4), ("jumprelu", 3584, 488_281, 7e-5)],
)
def test_it_is_near_the_papers_at_their_lengths(variant: str, d_in: int, steps: int, theirs: float) -> None:
    assert 1 / 2.5 < learning_rate(variant, d_in, steps) / theirs < 2.5


def test_it_is_not_extrapolated_below_the_narrowest_site_measured() -> None:
    assert learning_rate("topk", 16, 900) == learning_rate("topk", 64, 900)


def test_a_run_records_the_rate_it_used_and_what_was_asked(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk"))
    training = load_config(tmp_path / "run")["training"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    used = learning_rate("topk", 16, 30)
    assert (training["optimizer"]["lr"], training["lr_asked"]) == (used, "auto")
    assert (record["settings"]["optimizer"]["lr"], record["settings"]["lr_asked"]) == (used, "auto")
    assert record["numbers"]["optimizer"]["lr"] == used


def test_a_number_stays(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk", "optimizer.lr=0.004"))
    training = load_config(tmp_path / "run")["training"]
    assert (training["optimizer"]["lr"], training["lr_asked"]) == (0.004, 0.004)


def test_the_rule_s_rate_given_as_a_number_is_the_same_run(
    short: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(short("sae=topk"))
    train(short("sae=topk", f"optimizer.lr={learning_rate('topk', 16, 30)}"))
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=fast"], "optimizer.lr=fast is not allowed: it should be 'auto' or"),
        (["optimizer.name=sgd", "optimizer.betas=null", "optimizer.eps=null"], "measured for Adam"),
    ],
)
def test_what_the_rule_cannot_answer_is_refused(short: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(short("sae=topk", *overrides))
