"""python -m pytest tests/train/sae/test_sparse.py: selection against a plain sort, with ties and degenerate batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from train.sae import sparse
from train.sae.sparse import top_of_batch, top_per_token


def by_sorting(z: Tensor, count: int) -> tuple[list[int], float]:
    """Positions kept in the flattened batch, and the smallest value kept (0 where fewer than `count` are positive)."""
    flat = z.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count]
    kept = sorted(i for i in order if flat[i] > 0)
    return kept, min(flat[i] for i in kept) if len(kept) == count else 0.0


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int]:
    rows, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "few values", "negative", "equal", "skewed latents"]))
    z = rng.normal(size=(rows, width))
    if kind == "few values":
        z = rng.integers(-2, 3, size=z.shape).astype(float)
    elif kind == "negative":
        z = -np.abs(z)
    elif kind == "equal":
        z = np.full_like(z, draw(st.sampled_from([-1.0, 0.0, 2.0])))
    elif kind == "skewed latents":
        z = z + 10 * (np.arange(width) % 7 == 0)
    return torch.from_numpy(z).to(draw(st.sampled_from([torch.float32, torch.float64]))), draw(
        st.integers(1, rows * width)
    )


@pytest.mark.parametrize("sampled", [False, True])
@given(batch=batches())
@settings(max_examples=150, deadline=None)
def test_the_batch_selection_is_that_of_a_sort(sampled: bool, batch: tuple[Tensor, int]) -> None:
    z, count = batch
    with pytest.MonkeyPatch.context() as patch:
        if sampled:  # the guess from a sample, as for large batches, and often a bad one
            patch.setattr(sparse, "_WORTH", 24)
            patch.setattr(sparse, "_SAMPLE", 24)
        kept, smallest = top_of_batch(z, count)
    positions, value = by_sorting(z, count)
    assert kept.flatten().nonzero().flatten().tolist() == positions
    assert smallest.item() == value
    assert smallest.dtype == z.dtype


def test_a_large_batch_takes_the_guess_and_is_exact() -> None:
    z = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    count = 512 * 16
    assert z.numel() >= sparse._WORTH
    guess = sparse._guess(z.flatten(), count, 1024)
    assert count < (z > guess).sum() < 2.5 * count  # close below the threshold: few candidates
    kept, smallest = top_of_batch(z, count)
    values = z.flatten().topk(count).values
    assert torch.equal(z[kept].sort(descending=True).values, values)
    assert smallest == values[-1]


def test_a_guess_that_is_too_high_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sparse, "_guess", lambda flat, count, width: 100.0)
    kept, smallest = top_of_batch(z, 40)
    assert kept.flatten().nonzero().flatten().tolist() == by_sorting(z, 40)[0]
    assert smallest == z.flatten().topk(40).values[-1]


def test_the_sample_sees_every_latent() -> None:
    """One latent in 64 carries all that is large: a stride that divides the width misses it, or sees nothing else."""
    z = torch.full((8192, 64), -1.0)
    z[:, 5] = torch.rand(8192, generator=torch.Generator().manual_seed(0)) + 1
    guess = sparse._guess(z.flatten(), 4096, 64)
    assert 1 < guess < 1.5  # 4096 of 8192 are above 1.5


@given(batch=batches(), share=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_selection_of_each_token_is_that_of_a_sort(batch: tuple[Tensor, int], share: float) -> None:
    z, _ = batch
    k = max(1, round(share * z.shape[1]))
    kept = top_per_token(z, k)
    for row, mask in zip(z, kept, strict=True):
        assert sorted(row[mask].tolist()) == sorted(value for value in row.topk(k).values.tolist() if value > 0)


def test_selection_by_hand() -> None:
    z = torch.tensor([[3.0, 1.0, 2.6], [1.0, 2.0, -2.2]])
    assert top_per_token(z, 1).tolist() == [[True, False, False], [False, True, False]]
    assert top_per_token(z, 3).tolist() == [[True, True, True], [True, True, False]]
    kept, smallest = top_of_batch(z, 4)  # 3, 2.6, 2 and the first of the two ones
    assert kept.tolist() == [[True, True, True], [False, True, False]]
    assert smallest == 1
    kept, smallest = top_of_batch(z, 6)  # only five are positive
    assert kept.sum() == 5
    assert smallest == 0
