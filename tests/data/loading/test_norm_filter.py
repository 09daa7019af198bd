"""Rows that are left out by their norm: which, their statistics, and that a loader gives all others once."""

from __future__ import annotations

import numpy as np
import pytest

from data.loading.loader import ActivationLoader
from data.loading.norm_filter import NormFilteredReader, median_norm, moments, sampled_chunks
from data.store.stats import Stats

SIZES = np.array([7, 1, 12, 9, 3], np.int64)


class Rows:
    """Rows [n, 2] in memory whose norms are known."""

    width, row_shape, dtype = 2, (2,), np.dtype(np.float32)
    bytes_read = 0

    def __init__(self, x_ND: np.ndarray, sizes: np.ndarray) -> None:
        import torch

        self.x_ND, self.sizes, self.torch_dtype = x_ND, sizes, torch.float32
        self.begins = np.cumsum(sizes) - sizes

    def read(self, chunk: int, out: np.ndarray, start: int = 0) -> None:
        begin = int(self.begins[chunk])
        part = self.x_ND[begin + start : begin + int(self.sizes[chunk])][: len(out)]
        out[: len(part)] = part


@pytest.fixture
def x_ND() -> np.ndarray:
    """Norms 5 i; rows 3, 7 (a whole chunk) and 20 to 22 are twenty times as long."""
    x = np.outer(np.arange(1, SIZES.sum() + 1), [3.0, 4.0]).astype(np.float32)
    x[[3, 7, 20, 21, 22]] *= 100
    return x


def test_the_rows_above_the_limit_are_left_out(x_ND: np.ndarray) -> None:
    reader = NormFilteredReader(Rows(x_ND, SIZES), len(SIZES), 160.0, np.asarray)
    kept = np.setdiff1d(np.arange(32), [3, 7, 20, 21, 22])
    assert reader.sizes.tolist() == [6, 0, 12, 6, 3] and reader.left_out.rows == 5
    for chunk, size in enumerate(reader.sizes):
        for start in range(size + 1):
            for room in range(size - start + 2):
                out = np.full((room, 2), -1, np.float32)
                reader.read(chunk, out, start)
                whole = x_ND[kept][int(reader.sizes[:chunk].sum()) :][:size]
                filled = min(room, size - start)
                np.testing.assert_array_equal(out[:filled], whole[start:][:filled])
                assert (out[filled:] == -1).all()
    # At the limit itself a row stays.
    assert NormFilteredReader(Rows(x_ND, SIZES), 5, float(np.linalg.norm(x_ND[31])), np.asarray).sizes.sum() == 27
    assert NormFilteredReader(Rows(x_ND, SIZES), 3, 160.0, np.asarray).sizes.tolist() == [6, 0, 12]


def test_every_row_that_is_kept_comes_once_over_the_ranks(x_ND: np.ndarray) -> None:
    reader = NormFilteredReader(Rows(x_ND, SIZES), len(SIZES), 160.0, np.asarray)
    loaders = [ActivationLoader(reader, batch=4, rank=rank, world=2, pool_chunks=2) for rank in range(2)]
    for _ in range(2):
        got = (
            np.concatenate([batch.numpy()[:, 0] / 3 - 1 for loader in loaders for batch in loader]).round().astype(int)
        )
        assert len(got) == len(set(got)) == 24 and not {3, 7, 20, 21, 22} & set(got)


def test_the_moments_are_those_of_the_rows_that_are_kept(x_ND: np.ndarray) -> None:
    reader = NormFilteredReader(Rows(x_ND, SIZES), len(SIZES), 160.0, np.asarray)
    kept = np.delete(x_ND.astype(np.float64), [3, 7, 20, 21, 22], axis=0)
    found = moments(Stats.of(x_ND), reader.left_out)
    assert found["mean_sq_norm"] == pytest.approx(float((kept**2).sum(1).mean()), rel=1e-12)
    assert found["variance"] == pytest.approx(float(((kept - kept.mean(0)) ** 2).sum(1).mean()), rel=1e-12)


def test_the_median_is_that_of_a_seeded_sample(x_ND: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(x_ND, SIZES)
    norms = np.linalg.norm(x_ND.astype(np.float64), axis=1)
    assert median_norm(rows, 5, np.asarray) == pytest.approx(float(np.median(norms)), rel=1e-12)
    assert median_norm(rows, 3, np.asarray) == pytest.approx(float(np.median(norms[:20])), rel=1e-12)
    monkeypatch.setattr("data.loading.norm_filter.SAMPLE", 8)
    chunks = list(sampled_chunks(SIZES, 8))
    assert SIZES[chunks].sum() >= 8 > SIZES[chunks[:-1]].sum()
    sample = np.concatenate([norms[b : b + n] for b, n in zip(rows.begins[chunks], SIZES[chunks], strict=True)])
    assert median_norm(rows, 5, np.asarray) == pytest.approx(float(np.median(sample)), rel=1e-12)


def test_of_two_sites_a_row_goes_that_is_above_the_limit_at_either() -> None:
    """Rows [a | b] of one number each: 2 is too long at the first, 4 at the second, 5 at both."""
    pairs = np.array([[1, 1], [2, 2], [90, 3], [3, 3], [2, 70], [80, 60], [1, 2]], np.float32)
    reader = NormFilteredReader(
        Rows(pairs, np.array([4, 3])),
        2,
        50.0,
        lambda rows: rows[:, :1],
        decode_second=lambda rows: rows[:, 1:],
        limit_second=40.0,
    )
    assert [kept.tolist() for kept in reader.kept] == [[0, 1, 3], [2]] and reader.by_second == 1
    assert reader.left_out.rows == reader.left_out_second.rows == 3
    assert reader.left_out.sum.tolist() == [90 + 2 + 80] and reader.left_out_second.sum.tolist() == [3 + 70 + 60]
    without = NormFilteredReader(
        Rows(pairs, np.array([4, 3])), 2, 50.0, lambda rows: rows[:, :1], decode_second=lambda rows: rows[:, 1:]
    )
    assert [kept.tolist() for kept in without.kept] == [[0, 1, 3], [0, 2]] and without.by_second == 0
