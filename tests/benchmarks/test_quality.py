"""Quality beside the peers: what is made of the scores; where the peers are installed, the whole at a tiny size."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contestants.process import ROOT
from benchmarks.contestants.train_peer import Job, Trained, next_penalty, train
from benchmarks.quality import Score, best_rates, interval, main, penalties_of, results
from tests.helpers.corpus import save_model, write_stories

PEERS_PYTHON = ROOT / ".venv-peers/bin/python"


def score(library: str, seed: int, nmse: float, rate: float | None = None, l0: float = 8.0) -> Score:
    return Score(library, "topk", seed, rate, l0, nmse, 10 * nmse, 16)


def test_errors_are_read_at_one_l0_along_the_slope() -> None:
    """Twice the L0 asked for at a slope of 1: the error at k is twice what was measured."""
    read = score("ours", 0, 0.1, l0=16.0).at(8, slope=1.0)
    assert read.nmse == pytest.approx(0.2) and read.ce_increase == pytest.approx(2.0) and read.l0 == 16.0
    assert score("ours", 0, 0.1).at(8, slope=0.6) == score("ours", 0, 0.1)


def test_the_interval_over_seeds_is_students() -> None:
    """1, 2, 3: standard error sqrt(1/3), t of two degrees of freedom 4.3027."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.3027 / 3**0.5), rel=1e-4)
    mean, half = interval([5.0])
    assert mean == 5.0 and np.isnan(half)


def test_a_peer_is_taken_at_its_best_rate() -> None:
    tried = [score("sae_lens", 0, 0.3, 1e-3), score("sae_lens", 0, 0.2, 1e-2), score("sae_lens", 0, 0.25, 1e-1)]
    tried.append(score("dictionary_learning", 0, 0.1, 1e-1))
    best = best_rates(tried, 8, 0.6)
    assert best == {("sae_lens", "topk"): [1e-2], ("dictionary_learning", "topk"): [1e-1]}


def test_a_rate_is_not_best_by_a_larger_l0() -> None:
    tried = [score("sae_lens", 0, 0.20, 1e-3, l0=8.0), score("sae_lens", 0, 0.19, 1e-2, l0=16.0)]
    assert best_rates(tried, 8, 0.6) == {("sae_lens", "topk"): [1e-3]}


def test_a_row_a_library_with_means_and_intervals() -> None:
    made = [score("ours", seed, nmse) for seed, nmse in enumerate((0.1, 0.2))] + [score("sae_lens", 0, 0.3, 1e-2)]
    lines = results(made, 8, 0.6, width=64).splitlines()
    assert lines[2].startswith("| topk | ours | default | 2 | 8.00 ± 0.00 | 0.1500 ± 0.6353 |")
    assert lines[2].endswith("| 1.5000 ± 6.3531 | 25.0 ± 0.0% |")
    assert lines[3].startswith("| topk | sae_lens | 0.01 | 1 | 8.00 ± nan |")


def test_with_known_features_the_share_found_stands_for_the_ce_increase() -> None:
    made = [
        Score("ours", "topk", seed, None, 8.0, 0.1, float("nan"), 16, found) for seed, found in enumerate((0.5, 0.7))
    ]
    heads, _, row = results(made, 8, 0.6, width=64).splitlines()
    assert heads.endswith("| silent | features found |") and "CE" not in heads
    assert row.endswith("| 25.0 ± 0.0% | 60.0 ± 127.1% |")


def job(library: str, variant: str, out: Path, rate: float = 1e-2) -> Job:
    return Job(library, variant, "", 64, 8, rate, 0, str(out))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
def test_a_coefficient_is_corrected_until_l0_is_near(tmp_path: Path, power: float) -> None:
    """L0 = 100 / coefficient^power, from the library's default on: the search ends within 3% of 8."""
    tried: list[float] = []

    def library(_: Job, __: object, penalty: float | None) -> Trained:
        assert penalty is not None
        tried.append(penalty)
        return Trained(100 * penalty**-power, lambda out: out.mkdir())

    asked = job("sae_lens", "relu", tmp_path / "out")
    train(asked, library, None)
    assert tried[0] == 1.0 and len(tried) <= 6
    assert 100 * tried[-1] ** -power == pytest.approx(8, rel=0.03)
    found = penalties_of([asked], {("sae_lens", "relu"): [1e-2]})
    assert found == {("sae_lens", "relu"): tried[-1]}
    assert penalties_of([asked], {("sae_lens", "relu"): [1e-3]}) == {}


def test_a_coefficient_moves_at_most_eightfold() -> None:
    assert next_penalty([(1.0, 0.0)], 8) == pytest.approx(1 / 8)
    assert next_penalty([(1.0, 1e6)], 8) == pytest.approx(8)


def test_a_library_that_aims_at_an_l0_trains_once(tmp_path: Path) -> None:
    asked: list[float | None] = []

    def library(_: Job, __: object, penalty: float | None) -> Trained:
        asked.append(penalty)
        return Trained(30.0, lambda out: out.mkdir())

    train(job("dictionary_learning", "jumprelu", tmp_path / "out"), library, None)
    assert asked == [None]


@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs make peers")
def test_peers_train_on_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "lm")
    write_stories(tmp_path / "stories.jsonl", range(6000))
    sizes = ["--tokens", "4096", "--heldout", "500", "--k", "4", "--batch", "256", "--seeds", "0", "--rates", "1e-2"]
    sizes += ["--context", "32"]
    where = ["--model", str(tmp_path / "lm"), "--text", str(tmp_path / "stories.jsonl"), "--site", "resid_post.0"]
    main([*where, *sizes, "--variants", "topk", "gated", "--out", str(tmp_path / "out")])
    table = capsys.readouterr().out
    for variant in ("topk", "gated"):
        for library in ("ours", "dictionary_learning", "sae_lens"):
            assert f"| {variant} | {library} |" in table
    batches = np.load(tmp_path / "out" / "batches-0.npy")
    assert batches.shape[:2] == (16, 256)
    assert "torch" in sys.modules
