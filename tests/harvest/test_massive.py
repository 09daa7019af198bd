"""python -m pytest tests/harvest/test_massive.py: a model with a planted sink, whose first position has a huge norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.loading.reader import open_reader
from data.store.int8 import FeatureScale, encode
from data.store.manifest import TRAIN
from data.store.massive import TIMES_MEDIAN, has_massive_rows, massive_line, norm_spread
from data.store.stats import Stats
from data.store.store import ORIGIN, Store
from data.tools.info import report
from harvest.int8_scales import ordinary_rows
from harvest.run import harvest
from tests.helpers.corpus import CONTEXT, config, save_model, write_stories

SITE = "resid_post.1"
NO_BOS = ("packing.bos=none", "tokens=1600", "heldout_tokens=0", "packing.heldout=0")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("texts") / "stories.jsonl", range(60))


@pytest.fixture(scope="module")
def sink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "sink", sink=400.0)


def values(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """All rows of the site [N, D] as they are read, and their positions in the context [N]."""
    rows, origin = open_reader(store, TRAIN, SITE), open_reader(store, TRAIN, ORIGIN)
    decode, xs, positions = store.rows_of(SITE).values, [], []
    for index, n in enumerate(rows.sizes):
        stored = np.zeros((n, *store.row_shape(TRAIN, SITE)), store.rows_of(SITE).dtype)
        rows.read(index, stored)
        where = np.zeros((n, 2), np.int32)
        origin.read(index, where)
        xs.append(decode(stored))
        positions.append(where[:, 1])
    return np.concatenate(xs).astype(np.float64), np.concatenate(positions)


def nmse(x: np.ndarray, stored: np.ndarray) -> float:
    return float(np.square(x - stored).sum() / np.square(x - x.mean(0)).sum())


def test_the_planted_rows_are_massive_and_all_others_ordinary(sink: Path, text: Path, tmp_path: Path) -> None:
    x, positions = values(harvest(config(sink, text, tmp_path, *NO_BOS)))
    norms = np.linalg.norm(x, axis=1)
    assert ((norms > TIMES_MEDIAN * np.median(norms)) == (positions == 0)).all()
    assert (positions == 0).mean() == 1 / CONTEXT


def test_harvest_and_info_warn_of_them_in_one_line(
    sink: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = harvest(config(sink, text, tmp_path, *NO_BOS))
    line = massive_line(SITE, store.stats(TRAIN, SITE))
    assert line is not None and line.startswith(f"{SITE} has massive activations (rms norm ")
    assert line.endswith("train with outliers=10, which leaves those rows out") and "\n" not in line
    said = capsys.readouterr().out
    assert f"note: {line}\n" in said
    assert f"store={store.path} site={SITE} outliers=10 tokens=" in said
    assert f"note: {line}" in list(report(store.path, 10.0, 100))
    harvest(config(sink, text, tmp_path, *NO_BOS))
    assert f"note: {line}\n" in capsys.readouterr().out


def test_a_model_without_a_sink_is_not_warned_of(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = harvest(config(save_model(tmp_path / "plain"), text, tmp_path / "cache", *NO_BOS))
    assert not has_massive_rows(store.stats(TRAIN, SITE))
    assert "note:" not in capsys.readouterr().out
    assert not any("massive" in line for line in report(store.path, 10.0, 100))


def test_with_a_bos_that_is_left_out_the_sink_is_left_out_with_it(sink: Path, text: Path, tmp_path: Path) -> None:
    store = harvest(config(sink, text, tmp_path, *NO_BOS, "packing.bos=context"))
    assert not has_massive_rows(store.stats(TRAIN, SITE))


def test_the_spread_by_hand() -> None:
    # One row of norm 9 in three of norm 1: mean 3, mean square 21.
    stats = Stats.of(np.array([[1.0, 0], [0, 1], [9, 0], [0, 1]]))
    assert norm_spread(stats) == pytest.approx(21**0.5 / 3)
    assert norm_spread(Stats.of(np.zeros((3, 2)))) == 1.0 and not has_massive_rows(Stats.of(np.zeros((3, 2))))


def test_one_massive_row_in_thousands_is_seen() -> None:
    x = np.random.default_rng(0).standard_normal((4000, 16))
    assert not has_massive_rows(Stats.of(x))
    x[7, 3] = 24 * 4.0  # the mean norm is 4
    stats = Stats.of(x)
    assert norm_spread(stats) < 1.1 and has_massive_rows(stats)


# int8


def test_int8_keeps_ordinary_rows_exact_beside_massive_ones(sink: Path, text: Path, tmp_path: Path) -> None:
    """The goal is an NMSE of 1e-4 on ordinary rows; with the scales of all rows it is missed by far."""
    plain, positions = values(harvest(config(sink, text, tmp_path / "plain", *NO_BOS)))
    coded, again = values(harvest(config(sink, text, tmp_path / "int8", *NO_BOS, "store.encoding=int8")))
    assert (positions == again).all()
    ordinary = positions > 0
    assert nmse(plain[ordinary], coded[ordinary]) < 1e-4
    massive = np.linalg.norm(plain[~ordinary] - coded[~ordinary], axis=1) / np.linalg.norm(plain[~ordinary], axis=1)
    assert massive.max() < 0.02

    import torch

    everything = FeatureScale.of(plain.astype(np.float32))
    rows = torch.from_numpy(plain[ordinary].astype(np.float32))
    q = encode(rows, everything)
    scale = q[:, -4:].contiguous().view(torch.float32)
    old = (q[:, :-4] * scale) * torch.from_numpy(everything.std) + torch.from_numpy(everything.mean)
    assert nmse(plain[ordinary], old.double().numpy()) > 3e-4


def test_ordinary_rows_are_all_where_none_is_massive() -> None:
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    assert ordinary_rows(x) is x
    x[3] = 1000.0
    assert (ordinary_rows(x) == np.delete(x, 3, 0)).all()
    x[4, 0] = np.nan
    assert len(ordinary_rows(x)) == 49  # what is not finite is refused elsewhere
    assert len(ordinary_rows(np.full((2, 3), np.nan, np.float32))) == 2
