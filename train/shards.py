"""The checkpoint of a dictionary split over processes: an index and one file of each part, for any number of parts.

`last.ckpt` is the index, with everything that all processes have alike; it names the files of the parts, which hold
what has a row for each latent. As many processes read a part each; of any other number each takes its rows out of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.base.errors import UserError
from train.sae import SAE
from train.sae.parts.split import LatentSplit
from train.sae_trainer import State

OF_PART = ("sae", "dead", "optimizer", "average")
"""Parts of a state with rows of latents."""
SHARDS = "shards"
"""The files of the parts, in an index."""
_REMEDY = "put it back, or remove the run's folder and train anew"
_PATTERN = "last.*-of-*.ckpt"


def shard_name(step: int, rank: int, ranks: int) -> str:
    """Name the file of a part at a step."""
    return f"last.{step}.{rank}-of-{ranks}.ckpt"


def divide(state: State, split: LatentSplit) -> tuple[State, State]:
    """Divide a process's state into what is in the index, and its part."""
    step = state["step"]
    names = [shard_name(step, rank, split.size) for rank in range(split.size)]
    index = {name: value for name, value in state.items() if name not in OF_PART} | {SHARDS: names}
    part = {name: state[name] for name in OF_PART if name in state}
    return index, part | {"run": state["run"], "step": step, "rank": split.rank, "ranks": split.size}


def remove_others(folder: Path, names: Sequence[str]) -> None:
    """Remove the files of parts that the index does not name."""
    for path in folder.glob(_PATTERN):
        if path.name not in names:
            path.unlink(missing_ok=True)


def own_state(sae: SAE, state: State, folder: Path, read: Callable[[Path, bool], Any], average: bool) -> State:
    """Give the state of the latents that `sae` holds, of a checkpoint in `folder`.

    `read` loads a file of it, its tensors left on the disk or not, and gives None where it is damaged. `average`:
    whether the run has a mean of its weights. UserError where a part is missing, damaged or of another step.
    """
    names = state.get(SHARDS)
    split = sae.split
    if names is None and split.size == 1:
        return state
    if names is None:  # of one process: one part that holds all latents
        parts: list[State] = [state]
    else:
        if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError(f"{folder} has a damaged index of its checkpoint: {_REMEDY}")
        same = len(names) == split.size
        wanted = [split.rank] if same else range(len(names))
        parts = [
            _part(folder / names[rank], rank, len(names), state, read, mapped=not same, average=average)
            for rank in wanted
        ]
        if same:
            return state | {name: parts[0][name] for name in OF_PART if name in parts[0]}
    return state | _joined(sae, parts)


def _part(
    path: Path, rank: int, ranks: int, index: State, read: Callable[[Path, bool], Any], *, mapped: bool, average: bool
) -> State:
    if not path.is_file():
        raise UserError(f"{path} is missing, a part of the checkpoint: {_REMEDY}")
    part = read(path, mapped)
    said = {"run": index["run"], "step": index["step"], "rank": rank, "ranks": ranks}
    needed = set(OF_PART) - (set() if average else {"average"})
    if not isinstance(part, dict) or {name: part.get(name) for name in said} != said or not needed <= part.keys():
        raise UserError(f"{path} is damaged or of another checkpoint: {_REMEDY}")
    return part


def _joined(sae: SAE, parts: Sequence[State]) -> State:
    """Take the rows of the latents that `sae` holds out of parts of another number of processes."""

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        return take_rows(tensors, sae.width, sae.split)

    replicated = sae.replicated | {name for name, _ in sae.named_buffers()}
    first = parts[0]
    state: State = {}
    for name in ("sae", "average"):
        if name in first:
            state[name] = {
                key: value if key in replicated else rows([part[name][key] for part in parts])
                for key, value in first[name].items()
            }
    state["dead"] = {key: rows([part["dead"][key] for part in parts]) for key in first["dead"]}
    names = {id(parameter): name for name, parameter in sae.named_parameters()}
    order = [names[id(parameter)] for group in sae.parameter_groups() for parameter in group["params"]]
    moments: dict[int, State] = {}
    for number, of_parameter in first["optimizer"]["state"].items():
        whole = order[number] in replicated
        moments[number] = {
            key: value
            if whole or not isinstance(value, Tensor) or not value.dim()
            else rows([part["optimizer"]["state"][number][key] for part in parts])
            for key, value in of_parameter.items()
        }
    state["optimizer"] = {**first["optimizer"], "state": moments}
    return state


def take_rows(parts: Sequence[Tensor], width: int, split: LatentSplit) -> Tensor:
    """Take the rows of a process's latents out of the parts of a tensor over `width` latents, part r of n having those
    with f = r mod n."""
    if any(len(part) != len(range(rank, width, len(parts))) for rank, part in enumerate(parts)):
        raise UserError(
            "the checkpoint's optimizer has no row for each latent, so it cannot go on with another "
            "trainer.latent_ranks: give the one it had"
        )
    latents_d = split.latent(torch.arange(split.own(width)))
    own = parts[0].new_empty(len(latents_d), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        at = (latents_d % len(parts) == rank).nonzero().squeeze(1)
        own[at] = part[latents_d[at] // len(parts)]
    return own
