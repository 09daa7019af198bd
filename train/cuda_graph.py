"""A training step as a CUDA graph: captured once for each shape of its inputs, then one launch a step.

A step of a narrow SAE is some 150 small launches, which take the host longer than the card takes for the work. A graph
replays what was captured, on the same memory and with the same numbers. So whatever differs from step to step lies in
tensors that stay where they are, and are filled before each replay.

Letters: B tokens in a batch, D model width, E width of what is predicted, d latents that may be dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from data.base.errors import UserError
from train.sae import SAE
from train.sae.parts.fused_update import is_fused_adam

MOST = 4  # graphs of an SAE at a time: as latents die and wake, AuxK has other shapes every few dozen steps
Figures = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Clock:
    """What a step takes from the number of steps before it: plain numbers, or tensors of one entry for a graph."""

    step: int | Tensor
    """Steps done before."""
    rates: list[float] | list[Tensor]
    """The learning rate of each of the optimizer's groups."""
    gain: float | Tensor
    """What the mean of the weights moves by; 1 where there is none."""
    sparsity_scale: float
    """Share of the sparsity coefficient, which no variant that can be captured reads."""
    settled: float
    """How much of the slow start is over of a coefficient that follows a wanted L0; likewise."""

    def on(self, weight: Tensor) -> Clock:
        """Give the same numbers as tensors beside `weight`."""
        # Fused Adam reads a rate in float32 on a GPU; in float64 on a CPU, where it is then the very number.
        precise = torch.float64 if weight.device.type == "cpu" else torch.float32
        rates = [torch.tensor(rate, dtype=precise, device=weight.device) for rate in self.rates]
        gain = torch.tensor(self.gain, dtype=weight.dtype, device=weight.device)
        return Clock(torch.tensor(self.step, device=weight.device), rates, gain, self.sparsity_scale, self.settled)

    def set_to(self, other: Clock) -> None:
        """Fill its tensors with the plain numbers of another one; the host waits for nothing."""
        assert isinstance(self.step, Tensor) and isinstance(self.gain, Tensor)
        self.step.fill_(other.step)
        self.gain.fill_(other.gain)
        for own, rate in zip(self.rates, other.rates, strict=True):
            assert isinstance(own, Tensor) and isinstance(rate, float)
            own.fill_(rate)


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What differs from step to step."""

    x_BD: Tensor
    """The batch, in model units."""
    target_BE: Tensor | None
    """Of a transcoder, what it is to predict."""
    may_die_d: Tensor | None
    """Latents that may be dead, where AuxK looks for them."""
    clock: Clock
    """What depends on the number of the step."""

    @property
    def tensors(self) -> list[Tensor | None]:
        """Return its tensors but the clock's."""
        return [self.x_BD, self.target_BE, self.may_die_d]

    @property
    def form(self) -> tuple[Any, ...]:
        """Return what a captured step depends on: shapes and dtypes."""
        return tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in self.tensors)

    def copied(self, weight: Tensor) -> StepInputs:
        """Give inputs of its own form, and a clock of tensors beside `weight`, for a graph to read."""
        x_BD, target_BE, may_die_d = (None if tensor is None else tensor.clone() for tensor in self.tensors)
        assert x_BD is not None
        return StepInputs(x_BD, target_BE, may_die_d, self.clock.on(weight))

    def set_to(self, other: StepInputs) -> None:
        """Fill its tensors with another step's."""
        for own, new in zip(self.tensors, other.tensors, strict=True):
            if own is not None:
                assert new is not None
                own.copy_(new, non_blocking=True)
        self.clock.set_to(other.clock)


class Graph(Protocol):
    """What captures a function's work on the device and repeats it."""

    def warm_up(self, act: Callable[[], Figures]) -> Figures:
        """Do `act` as it is, where a capture of it would run."""

    def capture(self, act: Callable[[], Figures]) -> Figures:
        """Record what `act` would do, without doing it; what it returns holds the results after each replay."""

    def replay(self) -> None:
        """Do what was recorded."""


@cache
def _pool() -> Any:
    """Return the memory of all graphs of the process."""
    # One for all: graphs follow each other on one stream, and nothing of one is read once another has run. So a pass
    # needs the memory of the largest step, not of all its SAEs' steps.
    return torch.cuda.graph_pool_handle()


class CudaGraph:
    """CUDA's own. No card has run it yet."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, act: Callable[[], Figures]) -> Figures:
        # On a side stream, as torch asks for: what libraries set up at their first use belongs to the stream.
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            figures = act()
        current.wait_stream(side)
        return figures

    def capture(self, act: Callable[[], Figures]) -> Figures:
        # thread_local: the loader's threads go on to reserve and copy memory meanwhile, which is theirs to do.
        with torch.cuda.graph(self._graph, pool=_pool(), capture_error_mode="thread_local"):
            return act()

    def replay(self) -> None:
        self._graph.replay()


@dataclass(eq=False)
class _Captured:
    """A graph with what it reads and writes."""

    graph: Graph
    inputs: StepInputs
    figures: Figures | None = None
    """Where a replay leaves its figures; None until it is captured."""


class StepGraphs:
    """The graphs of one SAE's step, one for each form of its inputs.

    The first step of a form runs as it is, which compiles kernels and makes the optimizer's state; the second is
    captured and replayed, and so on by replays.
    """

    def __init__(self, act: Callable[[StepInputs], Figures], make: Callable[[], Graph] = CudaGraph) -> None:
        self._act, self._make = act, make
        self._of: dict[tuple[Any, ...], _Captured] = {}

    def __call__(self, inputs: StepInputs, weight: Tensor, optimizer: Optimizer) -> Figures:
        """Take one step; the figures are overwritten by the next one. `weight` says where the parameters are."""
        form = (*inputs.form, weight.data_ptr())
        captured = self._of.pop(form, None)
        if captured is None:
            captured = _Captured(self._make(), inputs.copied(weight))
            self._remember(form, captured)
            return captured.graph.warm_up(partial(self._act, captured.inputs))
        self._remember(form, captured)
        captured.inputs.set_to(inputs)
        if captured.figures is None:
            with capturable(optimizer):
                captured.figures = captured.graph.capture(partial(self._act, captured.inputs))
        captured.graph.replay()
        return captured.figures

    def _remember(self, form: tuple[Any, ...], captured: _Captured) -> None:
        """Put it last, and forget the one that was not used for longest."""
        self._of[form] = captured
        if len(self._of) > MOST:
            del self._of[next(iter(self._of))]

    def drop(self) -> None:
        """Forget all graphs: parameters or moments are about to be somewhere else."""
        self._of.clear()


@contextmanager
def capturable(optimizer: Optimizer) -> Iterator[None]:
    """Let torch's optimizer be captured for a while; the fused one computes the same either way."""
    before = [group["capturable"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(optimizer.param_groups, before, strict=True):
            group["capturable"] = value


def check_capturable(sae: SAE, optimizer: Optimizer, device: torch.device, processes: int) -> None:
    """Raise UserError where a step of it cannot be captured."""
    if device.type != "cuda":
        raise UserError(f"trainer.cuda_graph=true is for a CUDA GPU, and this run is on {device.type}: leave it out")
    if processes > 1:
        raise UserError(f"trainer.cuda_graph=true is for one process, and there are {processes}: leave it out")
    if not sae.fixed_shapes:
        raise UserError(
            f"trainer.cuda_graph=true needs a step whose sizes are known beforehand, and {sae.name} keeps as many "
            "entries as it finds: leave it out, or take topk, batchtopk or matryoshka"
        )
    if not is_fused_adam(optimizer):
        raise UserError(
            "trainer.cuda_graph=true captures Adam and AdamW as one kernel: give optimizer.name=adam and "
            "optimizer.fused=true, or leave it out"
        )
