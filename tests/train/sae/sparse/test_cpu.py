"""The CPU's selections against a plain sort, with ties and degenerate batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.batches import batches
from train.sae.sparse.cpu import (
    AboveScan,
    CPUBackend,
    Scan,
    TopOfBatchScan,
    TopPerTokenScan,
    largest_of_lines,
    scan_of,
    select,
    top_of_rows,
)
from train.sae.sparse.product import Product
from train.sae.sparse.rules import Above, Entries, Rule, Selection, TopOfBatch, TopPerToken


def by_sorting(z: Tensor, count: int) -> tuple[list[int], float]:
    """Positions kept in the flattened batch, and the smallest value kept (0 where fewer than `count` are positive)."""
    flat = z.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count]
    kept = sorted(i for i in order if flat[i] > 0)
    return kept, min(flat[i] for i in kept) if len(kept) == count else 0.0


def whole(rule: Rule, z: Tensor, blocks: int = 1) -> tuple[list[int], list[float]]:
    """Positions in the flattened batch and values, of z fed in so many blocks."""
    scan, first = scan_of(rule), 0
    assert isinstance(scan, Scan)
    for block in z.tensor_split(min(blocks, z.shape[1]), dim=1):
        scan.feed(block.contiguous(), first)
        first += block.shape[1]
    entries = scan.finish()
    assert entries is not None
    rows, latents, values = entries
    return (rows * z.shape[1] + latents).tolist(), values.tolist()


def values_at(z: Tensor, positions: list[int]) -> list[float]:
    return z.flatten()[positions].tolist()


@given(batch=batches(), blocks=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_the_batch_selection_is_that_of_a_sort(batch: tuple[Tensor, int], blocks: int) -> None:
    z, count = batch
    kept, smallest = by_sorting(z, count)
    positions, values = whole(TopOfBatch(count), z, blocks)
    assert positions == kept
    assert values == values_at(z, positions)
    assert (min(values) if len(values) == count else 0.0) == smallest


@given(batch=batches(), blocks=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_batch_selection_may_take_what_is_negative(batch: tuple[Tensor, int], blocks: int) -> None:
    z, count = batch
    flat = z.flatten().tolist()
    wanted = sorted(sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:count])
    positions, values = whole(TopOfBatch(count, positive=False), z, blocks)
    assert positions == wanted
    assert values == values_at(z, positions)


@given(batch=batches(), share=st.floats(0, 1), blocks=st.integers(1, 5), positive=st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_selection_of_each_token_is_that_of_a_sort(
    batch: tuple[Tensor, int], share: float, blocks: int, positive: bool
) -> None:
    z, _ = batch
    k = max(1, round(share * z.shape[1]))
    expected = []
    for row, entries in enumerate(z.tolist()):
        order = sorted(range(len(entries)), key=lambda j: (-entries[j], j))[:k]
        expected += sorted(row * len(entries) + j for j in order if entries[j] > 0 or not positive)
    positions, values = whole(TopPerToken(k, positive=positive), z, blocks)
    assert positions == expected
    assert values == values_at(z, positions)


@given(batch=batches(), blocks=st.integers(1, 5), each=st.booleans())
@settings(max_examples=100, deadline=None)
def test_all_above_a_bound_are_kept(batch: tuple[Tensor, int], blocks: int, each: bool) -> None:
    z, seed = batch
    bound = torch.randn(z.shape[1] if each else (), dtype=z.dtype, generator=torch.Generator().manual_seed(seed))
    positions, values = whole(Above(bound), z, blocks)
    assert positions == (z > bound).flatten().nonzero().flatten().tolist()
    assert values == values_at(z, positions)
    scan = AboveScan(bound)
    scan.feed(z.contiguous(), 0)
    assert scan.count == len(positions)


def chosen(z: Tensor, rule: Rule, block_entries: int) -> Entries:
    """What the backend keeps of z, which it computes as z I in blocks of about so many entries."""
    product = Product(z, torch.eye(z.shape[1], dtype=z.dtype), None)
    (entries,) = CPUBackend(block_entries=block_entries).select(product, [Selection(rule)])
    assert isinstance(entries, Entries)
    return entries


@given(
    batch=batches(),
    share=st.floats(0, 1),
    scale=st.sampled_from([0.0, 0.5, 1.0, 1 / 0.95, 1.2, torch.inf, torch.nan, -1.0]),
    positive=st.booleans(),
    repeats=st.integers(1, 4),
)
@settings(max_examples=300, deadline=None)
def test_no_guess_changes_the_choice(
    batch: tuple[Tensor, int], share: float, scale: float, positive: bool, repeats: int
) -> None:
    """Guesses from far below to above all that is there, in one block or several, with ties and with none above 0."""
    z = batch[0].repeat(1, repeats)
    count = max(1, round(share * z.numel()))
    rule = TopOfBatch(count, positive)
    smallest = z.flatten().sort(descending=True).values[count - 1]
    for block_entries in (32 * len(z), 1 << 24):
        plain = chosen(z, rule, block_entries)
        guessed = chosen(z, replace(rule, guess=scale * smallest), block_entries)
        assert all(torch.equal(one, other) for one, other in zip(guessed, plain, strict=True))


def test_nan_is_chosen_from_with_a_guess_as_without() -> None:
    z = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    z[3, 40], z[7, 0] = torch.nan, torch.nan
    scans = [TopOfBatchScan(100, guess=guess) for guess in (torch.tensor(1.0), None)]
    for scan in scans:
        scan.feed(z, 0)
    assert scans[0].finish() is None and scans[1].finish() is not None


def test_a_good_guess_spares_reading_and_a_high_one_is_noticed() -> None:
    z = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    count = 512 * 16
    smallest = z.flatten().topk(count).values[-1]
    good, high = (TopOfBatchScan(count, guess=scale * smallest) for scale in (1.0, 1.2))
    for first in range(0, 4096, 1024):
        block = z[:, first : first + 1024].contiguous()
        good.feed(block, first)
        high.feed(block, first)
    assert count <= sum(len(part.rows_n) for part in good.parts) < 1.5 * count
    entries = good.finish()
    assert entries is not None and entries.values_n.min() == smallest
    assert high.finish() is None


@pytest.mark.parametrize("k", [1, 8, 40])
def test_large_batches_agree_with_topk(k: int) -> None:
    z = torch.randn(256, 4096, generator=torch.Generator().manual_seed(k))
    rows, latents, values = select(TopOfBatch(256 * k), z)
    assert torch.equal(values.sort(descending=True).values, z.flatten().topk(256 * k).values)
    assert torch.equal(z[rows, latents], values)
    rows, latents, values = select(TopPerToken(k), z)
    assert torch.equal(values.view(256, k).sort(1, descending=True).values, z.topk(k, dim=1).values)
    assert torch.equal(z[rows, latents], values)


def test_the_bound_leaves_few_candidates() -> None:
    """What is read twice is little more than what is kept."""
    z = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0))
    for scan in (TopOfBatchScan(512 * 16, positive=True), TopPerTokenScan(16, positive=True)):
        scan.feed(z, 0)
        assert 512 * 16 <= sum(len(part.rows_n) for part in scan.parts) < 1.3 * 512 * 16


def test_selection_by_hand() -> None:
    z = torch.tensor([[3.0, 1.0, 2.6], [1.0, 2.0, -2.2]])
    assert whole(TopPerToken(1), z)[0] == [0, 4]
    assert whole(TopPerToken(3), z)[0] == [0, 1, 2, 3, 4]
    assert whole(TopPerToken(3, positive=False), z)[0] == [0, 1, 2, 3, 4, 5]
    assert whole(TopOfBatch(4), z)[0] == [0, 1, 2, 4]  # 3, 2.6, 2 and the first of the two ones
    assert whole(TopOfBatch(6), z)[0] == [0, 1, 2, 3, 4]  # only five are positive


def test_the_k_largest_of_given_entries() -> None:
    rows = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    values = torch.tensor([1.0, 3.0, 1.0, 2.0, 5.0, 2.0, 2.0])
    entries = Entries(rows, torch.arange(7), values)
    assert top_of_rows(entries, 2, 4).tolist() == [True, True, False, True, True, False, False]
    assert top_of_rows(entries, 4, 4).all()
    assert top_of_rows(Entries(rows[:0], rows[:0], values[:0]), 1, 3).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_of_lines_are_those_of_a_sort(dtype: torch.dtype) -> None:
    values = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[2, :5] = values[2, 5]
    values[3, 1] = torch.inf
    before = values.clone()
    for count in (1, 9, 40):
        found = largest_of_lines(values, count)
        assert torch.equal(
            found.sort(dim=1, descending=True).values, before.sort(dim=1, descending=True).values[:, :count]
        )
    assert torch.equal(values, before)


def test_nan_is_among_the_largest_of_its_line() -> None:
    values = torch.tensor([[1.0, torch.nan, 3.0, 2.0], [4.0, 1.0, 2.0, 3.0]])
    found = largest_of_lines(values, 2)
    assert found[0].isnan().sum() == 1 and found[0].nan_to_num(0).max() == 3
    assert sorted(found[1].tolist()) == [3, 4]
