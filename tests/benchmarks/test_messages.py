"""The messages of a step over processes of this machine are those of the formula, each with its bytes."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.counting import Shape
from benchmarks.memory import CHOOSING, VARIANTS
from benchmarks.messages import count, formula, watched
from benchmarks.scale import Run


@pytest.mark.slow
@pytest.mark.parametrize(("latent_ranks", "data_ranks"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_the_formula_is_what_is_sent(latent_ranks: int, data_ranks: int) -> None:
    runs = []
    for variant in VARIANTS:
        for dead in (0, 100) if variant in CHOOSING else (0,):
            shape = Shape(variant, width=1000, d_model=64, batch=256, k=8, dead=dead)
            runs.append(Run(shape, 1e6, latent_ranks, data_ranks))
    for run, found in zip(runs, count(runs), strict=True):
        assert sorted(found) == sorted(formula(run)), run.shape


def test_what_is_watched_goes_on_as_before() -> None:
    """No process group is needed to see that the functions are put back, and that a message is written down."""
    import torch
    import torch.distributed as dist

    before = dist.all_reduce, dist.all_gather, dist.broadcast
    with watched({None: "data"}) as found, pytest.raises(ValueError, match="process group"):
        dist.all_reduce(torch.zeros(3))
    assert found == [("all_reduce", "data", 12)]
    assert (dist.all_reduce, dist.all_gather, dist.broadcast) == before


def test_one_process_has_no_messages() -> None:
    run = Run(Shape("batchtopk", width=1000, d_model=64, batch=256, k=8), 1e6)
    assert formula(run) == []
    assert len(formula(dataclasses.replace(run, data_ranks=2))) > 0
