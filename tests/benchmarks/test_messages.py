"""The messages of a step over processes of this machine are those of the formula, each with its bytes."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.counting import Shape
from benchmarks.memory import CHOOSING, VARIANTS
from benchmarks.messages import PIECE, SHARD, count, formula, watched
from benchmarks.scale import Run, collectives, gathering, gathering_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("latent_ranks", "data_ranks"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_the_formula_is_what_is_sent(latent_ranks: int, data_ranks: int) -> None:
    runs = []
    for variant in VARIANTS:
        for dead in (0, 100) if variant in CHOOSING else (0,):
            shape = Shape(variant, width=1000, d_model=64, batch=256, k=8, dead=dead)
            runs.append(Run(shape, 1e6, latent_ranks, data_ranks))
    for run, found in zip(runs, count(runs), strict=True):
        assert sorted(found.step) == sorted(formula(collectives(run))), run.shape
        assert sorted(found.gathering) == sorted(formula(gathering(run, SHARD, PIECE))), run.shape
        if latent_ranks > 1:
            takes_a_few_pieces(run, found.memory)


@pytest.mark.slow
def test_the_final_sae_of_two_processes_takes_as_much_as_the_formula_says() -> None:
    """The messages of its pieces, each with its bytes, and memory for a few pieces whatever the size of the whole."""
    run = Run(Shape("jumprelu", width=1001, d_model=64, batch=64, k=8), 1e6, latent_ranks=2)
    (found,) = count([run])
    assert found.gathering == formula(gathering(run, SHARD, PIECE)) and len(found.gathering) > 30
    takes_a_few_pieces(run, found.memory)


def takes_a_few_pieces(run: Run, memory: int) -> None:
    """The memory of the final SAE is by the formula, far from a matrix of the whole dictionary."""
    by_formula = gathering_bytes(run, SHARD, PIECE)
    # A thread of gloo's may let go of what came in and went out a moment later.
    assert 0.8 * by_formula < memory < by_formula + 4 * PIECE * (1 + 1 / run.latent_ranks), run.shape
    assert memory < 4 * run.shape.width * run.shape.d_model / 4


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
    assert collectives(run) == [] and gathering(run) == []
    assert len(collectives(dataclasses.replace(run, data_ranks=2))) > 0
