"""Count the messages of a training step over a mesh of processes, on this machine, beside the formula's.

    python -m benchmarks.messages --variants topk batchtopk --latent-ranks 2 --data-ranks 1

The processes are started here and reach each other over gloo; torch.distributed's functions are watched in the first
one, in a step that logs nothing. `benchmarks/scale.py` says what a run of any size sends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.counting import Shape, trainer_of
from benchmarks.memory import CHOOSING, VARIANTS
from benchmarks.scale import Run, collectives
from train.sae.parts.groups import RankGroup
from train.sae.parts.split import LatentSplit

Counted = tuple[str, str, int]
"""The kind of a message, over which dimension it goes, and its bytes."""


@contextmanager
def watched(names: dict[Any, str]) -> Iterator[list[Counted]]:
    """List the messages of the `with` block; `names` are the groups' by their handles."""
    found: list[Counted] = []
    before = {kind: getattr(dist, kind) for kind in ("all_reduce", "all_gather", "broadcast")}

    def watch(kind: str) -> Callable[..., Any]:
        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            own: Tensor = args[1] if kind == "all_gather" else args[0]
            found.append((kind, names[group], own.nbytes))
            return before[kind](*args, group=group, **kwargs)

        return call

    for kind in before:
        setattr(dist, kind, watch(kind))
    try:
        yield found
    finally:
        for kind, function in before.items():
            setattr(dist, kind, function)


def process(rank: int, runs: list[Run], folder: str) -> None:
    """Take two steps of each run as one process of its mesh; the first process writes down the second step's."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=runs[0].gpus)
    shape = (runs[0].data_ranks, runs[0].latent_ranks)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "latents"))
    data = RankGroup(mesh.size(0), mesh.get_local_rank(0), mesh.get_group(0))
    latents = LatentSplit(mesh.size(1), mesh.get_local_rank(1), mesh.get_group(1))
    for number, run in enumerate(runs):
        trainer = trainer_of(run.shape, split=latents, data=data)
        if run.shape.dead:
            # Every tenth latent has been silent for longer than any window, on every process alike.
            trainer.dead.since_F[::10] = 1 << 40
        generator = torch.Generator().manual_seed(data.rank)
        x_BD = torch.randn(run.own.batch, run.shape.d_model, generator=generator)
        trainer.training_step(x_BD)
        with watched({data.handle: "data", latents.handle: "latents"}) as found:
            trainer.training_step(x_BD)
        if rank == 0:
            (Path(folder) / f"{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def count(runs: list[Run]) -> list[list[Counted]]:
    """Count the messages of a step of each run; all of them have the same mesh."""
    with tempfile.TemporaryDirectory() as folder:
        spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(process, (runs, folder), nprocs=runs[0].gpus)
        written = [(Path(folder) / f"{number}.json").read_text() for number in range(len(runs))]
    return [[(kind, over, size) for kind, over, size in json.loads(text)] for text in written]


def formula(run: Run) -> list[Counted]:
    """List what the formula says, in the same form."""
    return [(message.kind, message.over, message.payload) for message in collectives(run)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--latent-ranks", type=int, default=2)
    parser.add_argument("--data-ranks", type=int, default=1)
    args = parser.parse_args()
    plain = [Run(Shape(name, 1000, 64, 256, 8), 1e6, args.latent_ranks, args.data_ranks) for name in args.variants]
    runs = plain + [replace(run, shape=replace(run.shape, dead=100)) for run in plain if run.shape.variant in CHOOSING]
    print("| SAE | may be dead | messages counted | by formula | bytes counted | by formula |")
    print("| :-- | --: | --: | --: | --: | --: |")
    for run, found in zip(runs, count(runs), strict=True):
        said = formula(run)
        sizes = [sum(size for _, _, size in messages) for messages in (found, said)]
        cells = [f"{run.shape.variant} {run.shape.width:,} x {run.shape.d_model}", str(run.shape.dead)]
        print("| " + " | ".join([*cells, str(len(found)), str(len(said)), *(f"{size:,}" for size in sizes)]) + " |")


if __name__ == "__main__":
    main()
