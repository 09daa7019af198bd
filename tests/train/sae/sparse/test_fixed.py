"""python -m pytest tests/train/sae/test_fixed.py: the GPU's selection and bookkeeping, of sizes known beforehand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.train.sae.sparse.test_select import batches
from train.sae.parts.auxk import DeadLatents
from train.sae.sparse import fixed
from train.sae.sparse.fixed import FixedSupport, choose, largest
from train.sae.sparse.select import TopOfBatch, TopPerToken


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
    for selector, kept in ((TopOfBatch(count), by_sorting(z.view(1, -1), count)), (TopPerToken(k), by_sorting(z, k))):
        rows, latents, values = choose(selector, firsts, lambda first, last: z[:, first:last].contiguous(), width)
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
    support = FixedSupport(torch.tensor([0, 0, 2, 2]), torch.tensor([1, 2, 0, 2]), (3, 3))
    assert support.row_ends.tolist() == [0, 2, 2, 4]
    assert support.latent_ends.tolist() == [0, 1, 2, 4]
    assert [part.tolist() for part in support.by_latent] == [[2, 0, 1, 3], [2, 0, 0, 2]]
    values = torch.tensor([5.0, 0.0, 2.0, 3.0])
    assert support.dense(values).tolist() == [[0, 5, 0], [0, 0, 0], [2, 0, 3]]
    assert support.fired(values).tolist() == [True, True, True]
    assert support.fired(torch.tensor([0.0, 0.0, -2.0, 3.0])).tolist() == [False, False, True]


@pytest.mark.parametrize("every", [1, 4])
def test_all_that_can_die_before_the_next_look_are_among(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, looks = DeadLatents(50), 0
    assert dead.among(60, 10, every) is None  # on a CPU the mask is looked at
    monkeypatch.setattr(fixed, "wanted", lambda x: True)
    generator, last = torch.Generator().manual_seed(0), None
    for _ in range(40):
        among_d = dead.among(60, 10, every)
        assert among_d is not None
        looks += among_d is not last
        last = among_d
        assert set(dead.mask(60).nonzero().flatten().tolist()) <= set(among_d.tolist())
        dead.update(torch.rand(50, generator=generator) < 0.3, 10)
    assert looks == 40 // every
    assert len(last) < 50
