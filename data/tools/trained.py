"""The trainings below a folder: which store each is of, whether it has ended, and what it takes on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.base.errors import UserError
from data.store.files import is_store

# As train/ names them, which this floor does not import.
CONFIG, RUN = "config.json", "run.json"
WEIGHTS, INDEX, SHARDS = "sae.safetensors", "sae.safetensors.index.json", "sae-*-of-*.safetensors"
CHECKPOINT, PARTS = "checkpoints/last.ckpt", "checkpoints/last.*-of-*.ckpt"


@dataclass(frozen=True)
class Training:
    """The folder of one training.

    fingerprints: the stores that its SAE and its run name. ended: whether the SAE is there. weights, checkpoint: bytes,
    of all files where there are several, 0 where there is none.
    """

    folder: Path
    fingerprints: frozenset[str]
    variant: str
    ended: bool
    weights: int
    checkpoint: int


def trainings(outputs: Path) -> Iterator[Training]:
    """Yield every training at or below a folder, by path, and whatever else there has such a record.

    Raises UserError where one cannot be read, for nothing is guessed, and OSError where a folder cannot be looked into.
    """
    if not outputs.is_dir():
        raise UserError(f"{outputs} is no folder: name with --outputs where the trained SAEs are")
    for at, folders, names in os.walk(outputs, onerror=_refuse):
        folder = Path(at)
        if is_store(folder):
            folders.clear()
            continue
        folders.sort()
        if {CONFIG, RUN}.isdisjoint(names):
            continue
        records = {name: _object(folder / name) for name in (CONFIG, RUN) if name in names}
        run = records.get(RUN, {}).get("numbers")
        named = (records.get(CONFIG, {}).get("fingerprint"), run.get("store") if isinstance(run, dict) else None)
        variant = records.get(CONFIG, {}).get("variant")
        yield Training(
            folder,
            frozenset(fingerprint for fingerprint in named if isinstance(fingerprint, str)),
            variant if isinstance(variant, str) else "",
            ended=CONFIG in names and not {WEIGHTS, INDEX}.isdisjoint(names),
            weights=_size(folder / WEIGHTS) + sum(map(_size, folder.glob(SHARDS))),
            checkpoint=sum(map(_size, checkpoint_files(folder))),
        )


def checkpoint_files(folder: Path) -> list[Path]:
    """List the files of a training's checkpoint: of a dictionary split over processes it has several."""
    return [path for pattern in (CHECKPOINT, PARTS) for path in sorted(folder.glob(pattern)) if path.is_file()]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _refuse(error: OSError) -> None:
    raise error  # what cannot be looked into may need any store


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} cannot be read, so what it needs is unknown: fix or remove it") from None
    return found if isinstance(found, dict) else {}
