"""The shuffle benchmark speaks of the loader's own order, and its formula is what that order gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import shuffle
from benchmarks.shuffle import Setting, companions, computed, cut, half_drained, ours, stored, uniform
from data.loading.loader import ActivationLoader
from data.store.layout import Layout

LAYOUT = Layout("bfloat16", context=64, chunk_rows=128, chunks_per_unit=16, mixing_seed=0)
SETTING = Setting(rows=64 * 1024, context=64, row_bytes=2, layout=LAYOUT)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "BATCH", 256)


class LabelReader:
    """A store whose rows are their own sequence number."""

    width, row_shape, dtype, torch_dtype, bytes_read = 1, (1,), np.dtype(np.float32), torch.float32, 0

    def __init__(self, labels: np.ndarray) -> None:
        self.labels, self.sizes = labels[:, None].astype(np.float32), SETTING.sizes

    def read(self, chunk: int, out: np.ndarray, start: int = 0) -> None:
        at = chunk * LAYOUT.chunk_rows
        part = self.labels[at + start : at + int(self.sizes[chunk])][: len(out)]
        out[: len(part)] = part


@pytest.mark.parametrize("pool_chunks", [3, 16])
def test_the_order_is_the_loader_s(pool_chunks: int) -> None:
    labels = stored(SETTING)
    loader = ActivationLoader(LabelReader(labels), batch=256, pool_chunks=pool_chunks)
    found = list(ours(SETTING, labels, pool_chunks))
    assert len(found) == len(loader) == 256
    for ours_, theirs in zip(found, loader, strict=True):
        np.testing.assert_array_equal(ours_, theirs[:, 0].numpy())


def test_by_hand() -> None:
    batches = [np.array([1, 1, 1, 2], np.int32), np.array([3, 3, 4, 4], np.int32)]
    assert companions(iter(batches)) == (6 + 0 + 2 + 2) / 8


@pytest.mark.parametrize("pool_chunks", [4, 16, 512])
def test_the_formula_is_what_the_order_gives(pool_chunks: int) -> None:
    measured = companions(ours(SETTING, stored(SETTING), pool_chunks))
    assert measured == pytest.approx(computed(SETTING, pool_chunks), rel=0.1)


def test_one_pool_of_everything_in_large_batches_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "BATCH", 2 * 16 * 512)
    assert computed(SETTING, 512) == pytest.approx(uniform(SETTING), rel=0.02)
    assert companions(ours(SETTING, stored(SETTING), 512)) == pytest.approx(uniform(SETTING), rel=0.02)


def test_a_uniform_shuffle_is_counted_as_one() -> None:
    mixed = stored(SETTING)[np.random.default_rng(1).permutation(SETTING.rows)]
    assert companions(cut(mixed)) == pytest.approx(uniform(SETTING), rel=0.1)


def test_a_half_drained_buffer_serves_nothing_twice() -> None:
    served = np.concatenate(list(half_drained(SETTING, 4096)))
    assert np.unique(served, return_counts=True)[1].max() <= SETTING.context
    assert len(served) > 0.9 * SETTING.rows
