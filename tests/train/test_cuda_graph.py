"""A step by a graph is the step itself, to the last bit; shown on a CPU by a graph that records torch's operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.recorded_graph import RecordedGraph
from benchmarks.stand_in import StandIn
from data.base.errors import UserError
from tests.helpers.slow import slow_unless
from tests.helpers.toy import FORMS, activations
from train.config import OptimizerSettings
from train.cuda_graph import MOST, StepGraphs, check_capturable
from train.optimizers import optimizer_from
from train.sae import VARIANTS
from train.sae.sparse.backend import use_backend
from train.sae_trainer import SAETrainer
from train.schedules import Schedule

D, F, B, STEPS = 16, 256, 64, 14
CAPTURED = ["topk", "topk multi", "batchtopk", "matryoshka"]


def trainer_of(form: str, folder: Path, *, optimizer: dict[str, Any] | None = None, **settings: Any) -> SAETrainer:
    """A trainer whose rate, mean of the weights and dead latents differ from step to step."""
    variant, own = FORMS[form]
    sae = VARIANTS[variant](D, F, **{**own, **settings})
    chosen = OptimizerSettings.of({"lr": 1e-2, "fused": True, **(optimizer or {})})
    return SAETrainer(
        sae,
        optimizer_from(chosen),
        Schedule.of_shares(STEPS, lr_warmup=0.3, lr_decay=0.3, sparsity_warmup=0.2),
        folder=folder,
        name=form,
        seed=0,
        dead_after=4 * B,
        ema=0.9,
        log_every=3,
    )


def started(form: str, folder: Path, **settings: Any) -> SAETrainer:
    trainer = trainer_of(form, folder, **settings)
    trainer.initialise(activations(512), mean_sq_norm=170.0, variance=20.0)
    trainer.begin(torch.device("cpu"))
    return trainer


def batch(step: int) -> Tensor:
    return activations(B, seed=1000 + step)


def take(trainer: SAETrainer, until: int = STEPS) -> list[dict[str, float]]:
    """Train by the GPU's path of sizes known beforehand; returns what was logged."""
    logged = []
    with use_backend(StandIn()):
        while trainer.step < until:
            trainer.training_step(batch(trainer.step))
            logged.append(trainer.figures_logged)
    return logged


def assert_same(one: Any, other: Any, place: str = "state") -> None:
    """The same nested values, tensors to the last bit."""
    assert type(one) is type(other), place
    if isinstance(one, Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name in one:
            assert_same(one[name], other[name], f"{place}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{place}[{i}]")
    else:
        assert one == other, place


@pytest.mark.parametrize("form", slow_unless({"matryoshka"}.__contains__, CAPTURED))
def test_weights_moments_mean_and_figures_are_those_of_a_run_without_graphs(form: str, tmp_path: Path) -> None:
    plain, graphed = started(form, tmp_path), started(form, tmp_path)
    made: list[RecordedGraph] = []
    graphed.use_graphs(lambda: made.append(RecordedGraph()) or made[-1])  # type: ignore[func-returns-value]
    logged = take(plain), take(graphed)
    assert_same(logged[0], logged[1])
    assert_same(plain.state(), graphed.state())
    assert logged[0][-1]["dead"] > 0 and sum(row.get("auxk", 0) > 0 for row in logged[0]) > 3
    # More than one form, as the list of latents that may be dead changed its length; most steps were replays.
    assert len(made) > 1 and sum(graph.replays for graph in made) >= STEPS - 2 * len(made)


@pytest.mark.parametrize("graphs_first", slow_unless([True].__contains__, [False, True]))
def test_a_run_goes_on_from_a_checkpoint_with_graphs_or_without(graphs_first: bool, tmp_path: Path) -> None:
    form = "batchtopk"
    whole, first = started(form, tmp_path), started(form, tmp_path)
    take(whole)
    if graphs_first:
        first.use_graphs(RecordedGraph)
    take(first, 8)
    torch.save(first.state(), tmp_path / "state")
    second = trainer_of(form, tmp_path)
    second.load(torch.load(tmp_path / "state"))
    second.begin(torch.device("cpu"))
    if not graphs_first:
        second.use_graphs(RecordedGraph)
    # The list of those that may die is made anew as a run goes on, and so may hold others that live.
    take(second)
    for name, value in whole.sae.state_dict().items():
        torch.testing.assert_close(second.sae.state_dict()[name], value, msg=name)


def test_a_loss_that_is_not_finite_is_named_by_its_own_step(tmp_path: Path) -> None:
    trainer = started("topk", tmp_path)
    trainer.use_graphs(RecordedGraph)
    take(trainer, 6)
    with use_backend(StandIn()):
        trainer.training_step(batch(6))
        trainer.training_step(batch(7) * torch.nan)
        with pytest.raises(UserError, match="not finite at step 7 "):
            trainer.training_step(batch(8))


def test_what_was_captured_is_dropped_as_weights_move_or_batches_change(tmp_path: Path) -> None:
    plain, graphed = started("topk", tmp_path), started("topk", tmp_path)
    graphed.use_graphs(RecordedGraph)
    with use_backend(StandIn()):
        for step in range(12):
            rows = activations(B if step < 5 else B // 2, seed=step)
            if step == 9:  # as Lightning moves a module: each parameter lies elsewhere
                for parameter in graphed.parameters():
                    parameter.data = parameter.data.clone()
                graphed.drop_graphs()
            for trainer in (plain, graphed):
                trainer.training_step(rows)
    assert_same(plain.state(), graphed.state())


def test_graphs_are_few(tmp_path: Path) -> None:
    """Of more forms than are remembered the oldest go, and are made anew when they come again."""
    seen: list[int] = []
    trainer = started("topk", tmp_path)
    trainer.use_graphs(lambda: seen.append(1) or RecordedGraph())  # type: ignore[func-returns-value]
    assert isinstance(trainer.graphs, StepGraphs)
    sizes = range(MOST + 1)
    with use_backend(StandIn()):
        for size in [*sizes, *sizes]:
            trainer.training_step(activations(B + size, seed=size))
    assert len(seen) >= 2 * (MOST + 1)


def test_a_step_draws_no_random_number(tmp_path: Path) -> None:
    """A graph could neither save nor restore the generators' state."""
    for form in FORMS:
        trainer = started(form, tmp_path)
        before = trainer.rng["cpu"]
        trainer.training_step(batch(0))
        assert torch.equal(trainer.rng["cpu"], before), form


def test_a_step_that_asks_the_device_for_a_value_cannot_be_captured(tmp_path: Path) -> None:
    trainer = started("relu", tmp_path)
    trainer.use_graphs(RecordedGraph)
    trainer.training_step(batch(0))
    with pytest.raises(RuntimeError, match="cannot wait for the device"):
        trainer.training_step(batch(1))  # the CPU's path, which counts what it keeps


@pytest.mark.parametrize(
    ("form", "optimizer", "device", "processes", "words"),
    [
        ("topk", {}, "cpu", 1, "this run is on cpu"),
        ("topk", {}, "cuda", 2, "there are 2"),
        ("jumprelu", {}, "cuda", 1, "jumprelu keeps as many entries as it finds"),
        ("topk", {"fused": False}, "cuda", 1, "optimizer.fused=true"),
        ("topk", {"name": "sgd", "fused": None}, "cuda", 1, "optimizer.name=adam"),
    ],
)
def test_what_cannot_be_captured_is_refused_in_a_sentence(
    form: str, optimizer: dict[str, Any], device: str, processes: int, words: str, tmp_path: Path
) -> None:
    trainer = trainer_of(form, tmp_path, optimizer=optimizer)
    with pytest.raises(UserError, match=words):
        check_capturable(trainer.sae, trainer.optimizer, torch.device(device), processes)


def test_what_can_be_captured_is_let_by(tmp_path: Path) -> None:
    for form in CAPTURED:
        trainer = trainer_of(form, tmp_path)
        check_capturable(trainer.sae, trainer.optimizer, torch.device("cuda"), 1)
