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
    ("variant", "d_in", "width", "steps", "theirs"),
    [
        ("batchtopk", 768, 24_576, 244_140, 3e-4),
        ("gated", 2560, 131_072, 244_140, 3e-4),
        ("jumprelu", 3584, 131_072, 488_281, 7e-5),
    ],
)
def test_it_is_near_the_papers_at_their_sizes(variant: str, d_in: int, width: int, steps: int, theirs: float) -> None:
    rate = learning_rate(variant, d_in, steps, batch=4096, expansion=width / d_in)
    assert 1 / 1.7 < rate / theirs < 1.7


def test_it_rises_with_the_fourth_root_of_the_batch_as_far_as_that_was_measured() -> None:
    at = {batch: learning_rate("gated", 64, 1000, batch=batch) for batch in (64, 256, 1024, 4096, 131_072)}
    assert at[1024] == learning_rate("gated", 64, 1000)
    assert at[4096] == pytest.approx(at[1024] * math.sqrt(2), rel=0.005)
    assert at[256] == pytest.approx(at[1024] / math.sqrt(2), rel=0.005)
    assert (at[64], at[131_072]) == (at[256], at[4096])


def test_it_falls_with_the_latents_by_a_power_of_the_variant() -> None:
    for variant, power in {"topk": 1 / 2, "batchtopk": 3 / 8, "gated": 1 / 4, "matryoshka": 0}.items():
        at_8 = learning_rate(variant, 64, 1000)
        assert learning_rate(variant, 64, 1000, expansion=8) == at_8
        assert learning_rate(variant, 64, 1000, expansion=128) == pytest.approx(at_8 / 16**power, rel=0.005)
        assert learning_rate(variant, 64, 1000, expansion=0.5) == learning_rate(variant, 64, 1000, expansion=2)


@pytest.mark.parametrize("size", ["sae.width=64", "sae.expansion=4", "sae.expansion=4 lr_at_width=64"])
def test_a_run_s_rate_is_of_its_latents_and_batch(short: Any, tmp_path: Path, size: str) -> None:
    """Where lr_at_width names a width, the rule is of that one: from there the rate falls by its root to the run's."""
    train(short("sae=topk", "batch=128", *size.split()))
    training = load_config(tmp_path / "run")["training"]
    assert training["optimizer"]["lr"] == learning_rate("topk", 16, 15, batch=128, expansion=4)


def test_it_is_not_extrapolated_below_the_narrowest_site_measured() -> None:
    assert learning_rate("topk", 16, 900) == learning_rate("topk", 64, 900)


def test_a_run_records_the_rate_it_used_and_what_was_asked(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk"))
    training = load_config(tmp_path / "run")["training"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    used = learning_rate("topk", 16, 30, batch=64, expansion=4)
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
    train(short("sae=topk", f"optimizer.lr={learning_rate('topk', 16, 30, batch=64, expansion=4)}"))
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
