"""The GPU's selection and bookkeeping, of sizes known beforehand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.batches import batches
from train.sae.sparse.codes import Support
from train.sae.sparse.rules import TopOfBatch, TopPerToken
from train.sae.sparse.triton import TritonBackend, choose, largest


def by_sorting(z: Tensor, count: int) -> list[int]:
    """Places of the `count` largest of each line in the flattened values."""
    found: list[int] = []
    for row, line in enumerate(z.tolist()):
        order = sorted(range(len(line)), key=lambda i: (-line[i], i))[:count]
        found += sorted(row * len(line) + i for i in order)
    return found


@given(batch=batches(), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_each_line_keeps_exactly_what_a_sort_keeps(batch: tuple[Tensor, int], share: float) -> None:
    z, _ = batch
    count = max(1, round(share * z.shape[1]))
    assert largest(z, count).tolist() == by_sorting(z, count)


@pytest.mark.parametrize("values", ["normal", "ties", "equal"])
def test_groups_hide_nothing(values: str) -> None:
    """Far more groups than are kept, so that the choice among maxima decides."""
    z = torch.randn(3, 32 * 40, generator=torch.Generator().manual_seed(0))
    z = {"normal": z, "ties": z.round(), "equal": torch.ones_like(z)}[values]
    for count in (1, 5, 39, 40, 41):
        assert largest(z, count).tolist() == by_sorting(z, count)
        assert largest(z.view(1, -1), count).tolist() == by_sorting(z.view(1, -1), count)


@given(batch=batches(), share=st.floats(0, 1), cut=st.integers(1, 39))
@settings(max_examples=200, deadline=None)
def test_blocks_keep_what_the_whole_keeps(batch: tuple[Tensor, int], share: float, cut: int) -> None:
    z, count = batch
    width, k = z.shape[1], max(1, round(share * z.shape[1]))
    firsts = range(0, width, cut)
    for rule, kept in ((TopOfBatch(count), by_sorting(z.view(1, -1), count)), (TopPerToken(k), by_sorting(z, k))):
        rows, latents, values = choose(rule, firsts, lambda first, last: z[:, first:last].contiguous(), width)
        assert (rows * width + latents).tolist() == kept
        assert torch.equal(values, z[rows, latents])


def test_nan_leaves_places_inside_the_values() -> None:
    z = torch.randn(4, 64)
    z[1] = torch.nan
    for count in (1, 60):
        places = largest(z, count)
        assert len(places) == 4 * count and 0 <= int(places.min()) <= int(places.max()) < z.numel()


def test_a_support_by_hand() -> None:
    """[[0, 5, 0*], [0, 0, 0], [2, 0, 3]], * kept with value 0."""
    support = Support(torch.tensor([0, 0, 2, 2]), torch.tensor([1, 2, 0, 2]), (3, 3), TritonBackend())
    assert support.row_ends.tolist() == [0, 2, 2, 4]
    assert support.by_latent.order_n.tolist() == [2, 0, 1, 3]
    assert support.by_latent.ends.tolist() == [0, 1, 2, 4]
    values = torch.tensor([5.0, 0.0, 2.0, 3.0])
    assert support.dense(values).tolist() == [[0, 5, 0], [0, 0, 0], [2, 0, 3]]
    assert support.fired(values).tolist() == [True, True, True]
    assert support.fired(torch.tensor([0.0, 0.0, -2.0, 3.0])).tolist() == [False, False, True]
