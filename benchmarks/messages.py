"""Count the messages of a training step over a mesh of processes, on this machine, beside the formula's; and of the
gathering of the final SAE, with the memory that it takes.

    python -m benchmarks.messages --variants topk batchtopk --latent-ranks 2 --data-ranks 1

The processes are started here and reach each other over gloo; torch.distributed's functions are watched in the first
one, in a step that logs nothing. `benchmarks/scale.py` says what a run of any size sends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.counter import Counter
from benchmarks.counting import Shape, trainer_of
from benchmarks.memory import CHOOSING, VARIANTS
from benchmarks.scale import Message, Run, collectives, gathering, gathering_bytes
from train.sae import SAE
from train.sae.parts.groups import RankGroup
from train.sae.parts.split import LatentSplit
from train.sae.weights_file import shard_latents, weight_pieces

Counted = tuple[str, str, int]
"""The kind of a message, over which dimension it goes, and its bytes."""
PIECE, SHARD = 2048, 100_000  # entries and bytes: small ones, so that a small SAE has several pieces and shards


@dataclass(frozen=True)
class Counts:
    """What one process counted of a run."""

    step: list[Counted]
    """The messages of a step."""
    gathering: list[Counted]
    """Those of the final SAE, in shards of `SHARD` bytes and pieces of `PIECE` entries."""
    memory: int
    """The most bytes that the gathering holds beside the state."""


@contextmanager
def watched(names: dict[Any, str], pause: float = 0.0) -> Iterator[list[Counted]]:
    """List the messages of the `with` block; `names` are the groups' by their handles.

    pause: seconds after each message, in which gloo's threads let go of what came in and went out.
    """
    found: list[Counted] = []
    before = {kind: getattr(dist, kind) for kind in ("all_reduce", "all_gather", "broadcast")}

    def watch(kind: str) -> Callable[..., Any]:
        def call(*args: Any, group: Any = None, **kwargs: Any) -> Any:
            own: Tensor = args[1] if kind == "all_gather" else args[0]
            found.append((kind, names[group], own.nbytes))
            done = before[kind](*args, group=group, **kwargs)
            time.sleep(pause)
            return done

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
        gathering, memory = gathered(trainer.sae, {data.handle: "data", latents.handle: "latents"})
        if rank == 0:
            written = {"step": found, "gathering": gathering, "memory": memory}
            (Path(folder) / f"{number}.json").write_text(json.dumps(written))
    dist.destroy_process_group()


def gathered(sae: SAE, names: dict[Any, str]) -> tuple[list[Counted], int]:
    """Take all pieces of the final SAE as the first process does; gives the messages, and the memory at the most."""
    # What gloo holds is not the formula's, and its threads are a moment behind.
    with Counter() as counter, watched(names, pause=0.01) as found:
        for tensor in sae.state_dict().values():
            counter.watch(tensor)
        counter.begin()
        before = counter.live
        for latents in shard_latents(sae, SHARD):
            for piece in weight_pieces(sae, latents, entries=PIECE):
                assert len(piece)
    return found, counter.peak - before


def count(runs: list[Run]) -> list[Counts]:
    """Count each run; all of them have the same mesh."""
    with tempfile.TemporaryDirectory() as folder:
        spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(process, (runs, folder), nprocs=runs[0].gpus)
        written = [(Path(folder) / f"{number}.json").read_text() for number in range(len(runs))]
    found = []
    for text in written:
        made = json.loads(text)
        step, gathering = ([(kind, over, size) for kind, over, size in made[name]] for name in ("step", "gathering"))
        found.append(Counts(step, gathering, made["memory"]))
    return found


def formula(messages: Iterable[Message]) -> list[Counted]:
    """List what the formula says, in the same form."""
    return [(message.kind, message.over, message.payload) for message in messages]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--latent-ranks", type=int, default=2)
    parser.add_argument("--data-ranks", type=int, default=1)
    args = parser.parse_args()
    plain = [Run(Shape(name, 1000, 64, 256, 8), 1e6, args.latent_ranks, args.data_ranks) for name in args.variants]
    runs = plain + [replace(run, shape=replace(run.shape, dead=100)) for run in plain if run.shape.variant in CHOOSING]
    print("| SAE | may be dead | of | messages counted | by formula | bytes counted | by formula |")
    print("| :-- | --: | :-- | --: | --: | --: | --: |")
    for run, found in zip(runs, count(runs), strict=True):
        end = formula(gathering(run, SHARD, PIECE))
        for what, counted, said in (("step", found.step, formula(collectives(run))), ("end", found.gathering, end)):
            sizes = [sum(size for _, _, size in messages) for messages in (counted, said)]
            cells = [f"{run.shape.variant} {run.shape.width:,} x {run.shape.d_model}", str(run.shape.dead), what]
            cells += [str(len(counted)), str(len(said)), *(f"{size:,}" for size in sizes)]
            print("| " + " | ".join(cells) + " |")
        print(f"  memory of the end: {found.memory:,} bytes counted, {gathering_bytes(run, SHARD, PIECE):,} by formula")


if __name__ == "__main__":
    main()
