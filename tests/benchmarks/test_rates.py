"""The search for a site's best rate, and the dictionary whose features are known."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import rates
from benchmarks.dictionary import SITE, Dictionary
from benchmarks.rates import Trial, table
from data.base.errors import UserError
from tests.helpers.runs import TARGET, add_target, composed, make_store
from train.rates import learning_rate
from train.sae import load_config

SMALL = ["trainer=cpu", "tokens=2560", "batch=128", "calibration_tokens=512", "heldout_tokens=512", "sae.width=32"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    return Path(str(Dictionary(d=16, features=24, l0=2).write(folder, 16_000, 1_000).path))


def test_the_best_is_read_at_the_target_and_set_beside_the_rule() -> None:
    trials = [
        Trial("gated", 0.6, 0.006, 0.100, 8.0, 3, 8),
        Trial("gated", 1.0, 0.01, 0.097, 8.0, 1, 8),
        Trial("gated", 1.7, 0.017, 0.095, 9.0, 2, 8),  # 0.102 at an L0 of 8
        Trial("topk", 1.0, 0.01, 0.105, 8.0, 0, 8),
        Trial("topk", 1.7, 0.017, 0.100, 8.0, 4, 8),
    ]
    gated, topk = table(trials).splitlines()[2:]
    assert gated == "| gated | 0.01 | 0.0970 | 8.0 | 1 | 0.01 | 0.0970 | 8.0 | 1 | 0.0% |"
    assert topk == "| topk | 0.017 | 0.1000 | 8.0 | 4 | 0.01 | 0.1050 | 8.0 | 0 | 5.0% |"


@pytest.mark.slow
def test_a_search_trains_the_rule_s_rate_among_others(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*SMALL, f"store={store}", f"site={SITE}", "sae.k=2"]
    rates.main([f"out={tmp_path}", "sae=topk,relu", "factors=0.5,1", *asked])
    out = capsys.readouterr().out
    assert "4 SAEs in one pass" in out
    assert re.search(r"\| topk \| 0\.\d+ \| 0\.\d{4} \| 2\.0 \| \d+ \| 0\.\d+ \| .*%", out)
    rows = (tmp_path / "rates.csv").read_text().splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [["topk", "0.5"], ["topk", "1.0"], ["relu", "0.5"], ["relu", "1.0"]]


@pytest.mark.slow
def test_a_search_with_a_target_is_of_transcoders(tmp_path: Path) -> None:
    add_target(make_store(tmp_path / "cache", composed("out=x")))
    asked = [*SMALL, f"cache={tmp_path / 'cache'}", "site=resid_post.3", f"target={TARGET}", "sae.k=2", "sae.skip=true"]
    found = rates.search(tmp_path / "saes", ["topk"], [1.0, 2.0], asked)
    rate = learning_rate("topk", 16, 20, batch=128, expansion=2)
    assert [trial.rate for trial in found] == [rate, 2 * rate]
    for trial in found:
        config = load_config(tmp_path / "saes" / f"topk-{trial.rate}")
        assert config["target"] == TARGET and config["settings"]["skip"]
        assert config["training"]["heldout"]["nmse"] == trial.nmse


def test_rates_are_compared_at_one_l0(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sae=relu has no L0 to compare at: give sae\.k"):
        rates.search(tmp_path, ["relu"], [1.0], [*SMALL, f"store={store}", f"site={SITE}"])


def test_a_misspelt_setting_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sea\.k is no setting: did you mean sae\.k\?"):
        rates.search(tmp_path, ["topk"], [1.0], ["sea.k=3"])


def test_a_mean_that_dwarfs_the_rest_is_said_where_the_encoder_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Dictionary(d=16, features=24, l0=2, offset=20).write(tmp_path / "cache", 16_000, 1_000).path
    asked = [*SMALL, f"store={store}", f"site={SITE}", "sae.k=2"]
    rates.search(tmp_path / "saes", ["relu", "gated", "jumprelu"], [1.0], asked)
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "the mean holds 9" in one]
    assert "relu-" in line and "gated" not in line and "jumprelu" not in line
    assert "give sae.apply_b_dec_to_input=true" in line


def test_the_dictionary_has_the_l0_and_the_features_it_says() -> None:
    known = Dictionary(d=32, features=64, l0=4)
    x = known.rows(20_000, 0)
    assert np.array_equal(x, known.rows(20_000, 0)) and not np.array_equal(x, known.rows(20_000, 1))
    assert known.rates.sum() == pytest.approx(4)
    expected = (known.rates * 13 / 12 - known.rates**2).sum() * 1.0  # of independent codes: E c^2 = 13/12, E c = 1
    assert x.var(0).sum() == pytest.approx(expected + 0.01 * 4 * 13 / 12, rel=0.03)


def test_found_counts_features_by_their_cosine() -> None:
    known = Dictionary(d=32, features=64, l0=4)
    right = torch.from_numpy(known.directions)
    assert known.found(3 * right) == 1.0
    assert known.found(-right) < 0.05
    assert (
        known.found(torch.cat([right[:16], torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).double()]))
        == 0.25
    )


def test_its_help_says_how_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    rates.main(["--help"])
    assert "python -m benchmarks.rates [out=outputs/rates]" in capsys.readouterr().out
