"""What a training step does to a device, counted without one: operations, bytes moved, memory, waits of the host.

torch's operations are seen as they are dispatched. With shapes alone (fake tensors) a step of a million latents is
counted in seconds, by the GPU's path of the code: `StandIn` is Triton's backend with its kernels replaced by their
shapes and their traffic. A fake tensor has no values, so a step that asked for one would end with an error.
Letters: B tokens in a batch, D model width, F latents, n entries, d latents that may be dead.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.counter import Counter, Operation, extent
from benchmarks.stand_in import StandIn
from train.config import OptimizerSettings
from train.optimizers import optimizer_from
from train.sae import VARIANTS
from train.sae.parts.groups import ALONE, RankGroup
from train.sae.parts.split import WHOLE, LatentSplit
from train.sae.sparse.backend import use_backend
from train.sae.sparse.triton import TritonBackend
from train.sae_trainer import SAETrainer
from train.schedules import Schedule

L0_PER_K = 3  # of the variants that pay for activity, as in the other benchmarks


@dataclass(frozen=True)
class Shape:
    """What is trained: sizes, and what changes the memory or the traffic of a step."""

    variant: str
    width: int
    """F."""
    d_model: int = 768
    """D."""
    batch: int = 4096
    """B."""
    k: int = 32
    """Latents a token of the variants that choose."""
    active: int | None = None
    """Latents active on a token of the variants with a bound; None for three times k."""
    dead: int = 0
    """Latents among which AuxK chooses, d."""
    ema: bool = False
    """Whether a mean of the weights is held."""

    @property
    def l0(self) -> int:
        """Return how many latents are active on a token of the variants with a bound."""
        return L0_PER_K * self.k if self.active is None else self.active


@dataclass(frozen=True)
class Count:
    """What a step came to."""

    operations: list[Operation]
    """In order."""
    state: int
    """Bytes that live between two steps, without the batch."""
    peak: int
    """Bytes at the most, with the batch."""

    @property
    def moved(self) -> dict[str, int]:
        """Return the bytes read and written, by part of the step."""
        parts: dict[str, int] = defaultdict(int)
        for operation in self.operations:
            parts[operation.part] += operation.read + operation.written
        return dict(parts)

    @property
    def waits(self) -> list[str]:
        """Return the operations for which the host waits."""
        return [operation.name for operation in self.operations if operation.waits]


def sae_settings(shape: Shape) -> dict[str, Any]:
    """Return the settings of the SAE that a shape names, in the form that conf/sae trains."""
    if shape.variant in ("topk", "batchtopk", "matryoshka"):
        return {"k": shape.k}
    return {"sparsity": 1.0, "target_l0": L0_PER_K * shape.k}


def trainer_of(
    shape: Shape, log_every: int = 1 << 40, split: LatentSplit = WHOLE, data: RankGroup = ALONE
) -> SAETrainer:
    """Make the trainer of an SAE, with fused Adam, of one process or as one of several; by default it logs no step."""
    return SAETrainer(
        VARIANTS[shape.variant](shape.d_model, shape.width, split=split, **sae_settings(shape)),
        optimizer_from(OptimizerSettings.of({"lr": 1e-3, "fused": True})),
        Schedule(1 << 40, 0, 0, 0),
        folder=Path("unused"),
        name=shape.variant,
        seed=0,
        dead_after=1000 * shape.batch,
        ema=0.999 if shape.ema else None,
        log_every=log_every,
        data=data,
    )


def count_step(
    shape: Shape, dense_share: float = TritonBackend.dense_share, candidates_from: int | None = None
) -> Count:
    """Count a plain step, not the first, on the GPU's path, by shapes alone; ends with an error if it asks a value.

    But for the number of entries above a bound, which is that of the shape, and for whether candidates held a choice.
    """
    counter = Counter(
        parameter_entries=shape.width * shape.d_model, z_entries=shape.batch * shape.width, candidates=shape.dead
    )
    stand_in = StandIn(
        counter=counter, above=shape.l0 * shape.batch, dense_share=dense_share, candidates_from=candidates_from
    )
    with FakeTensorMode(), use_backend(stand_in), counter:
        return _second_step(shape, counter, torch.empty(shape.batch, shape.d_model))


def count_real_step(shape: Shape, dense_share: float = TritonBackend.dense_share) -> Count:
    """Count the same with real tensors and the stand-ins' results: for small shapes, without AuxK."""
    counter = Counter(parameter_entries=shape.width * shape.d_model, z_entries=shape.batch * shape.width)
    with use_backend(StandIn(counter=counter, dense_share=dense_share)), counter:
        return _second_step(shape, counter, torch.randn(shape.batch, shape.d_model))


def _second_step(shape: Shape, counter: Counter, x_BD: Tensor) -> Count:
    counter.watch(x_BD)
    trainer = trainer_of(shape)
    trainer.training_step(x_BD)
    counter.begin()
    state = counter.live - extent(x_BD)
    trainer.training_step(x_BD)
    return Count(counter.operations, state, counter.peak)


def count_waits(variant: str) -> dict[str, list[str]]:
    """List what the host waits for on the GPU's path, in three steps of a tiny SAE.

    `look`: where it is looked up which latents may die, once in up to 50 steps; `plain`; `logged`. A copy from or to
    the device does not show on a CPU.
    """
    counter = Counter()
    shape = Shape(variant, width=256, d_model=16, batch=64, k=4)
    waits = {}
    with use_backend(StandIn(counter=counter)), counter:
        trainer = trainer_of(shape, log_every=3)
        for name in ("look", "plain", "logged"):
            counter.begin()
            trainer.training_step(torch.randn(shape.batch, shape.d_model))
            waits[name] = [operation.name for operation in counter.operations if operation.waits]
    return waits
