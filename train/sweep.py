"""The folders of a sweep's jobs: named by what differs between them, and found again by what they compute."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from data.base.files import write_atomic
from train.config import scope_of_override

_LONGEST = 100  # characters of a name; file systems end at 255 bytes, tables of a report much earlier
_OVERRIDES = Path(".hydra") / "overrides.yaml"  # below a job's folder, as Hydra writes it


def job_folder(overrides: Sequence[str], swept: frozenset[str], sweep: str) -> str:
    """Name the folder of a job below `sweep` by those of its `overrides` that the sweep varies.

    A folder in which a job with the same numbers began is its own, whatever it is called and however settings without
    effect on numbers have changed since. A name that another job has, or a long one, ends in a hash of all of them.
    """
    deciding = sorted(item.lstrip("+") for item in overrides if _sets_numbers(item))
    taken: set[str] = set()
    for folder in sorted(Path(sweep).glob("*/")):
        begun = _begun_with(folder)
        if begun == deciding:
            return folder.name
        if begun is not None:
            taken.add(folder.name)
    varied = [item for item in deciding if item.split("=")[0] in swept]
    name = _readable(varied or deciding)
    if len(name) > _LONGEST or name in taken:
        digest = hashlib.sha256("\n".join(deciding).encode()).hexdigest()[:8]
        name = f"{name[:_LONGEST]}_{digest}"
    return name


def write_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Write the overrides of a job that Hydra did not begin where `job_folder` looks for them."""
    path = folder / _OVERRIDES
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, OmegaConf.to_yaml(OmegaConf.create([*overrides])))


def _sets_numbers(override: str) -> bool:
    """Return whether a job with another value of this override trains another SAE;
    what is unknown here counts as such."""
    name = override.lstrip("+~").split("=")[0]
    scope = scope_of_override(override)
    moves = name in ("cache", "store") or name.startswith("hydra")  # a store may be moved, its rows are the same
    return not moves and (scope is None or scope.sets_numbers)


def _begun_with(folder: Path) -> list[str] | None:
    """Return the overrides that decide the numbers of the job that began in a folder; None where none did."""
    path = folder / _OVERRIDES
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception:  # not there, or no YAML: nobody's folder
        return None
    if not isinstance(content, list):
        return None
    return sorted(str(item).lstrip("+") for item in content if _sets_numbers(str(item)))


def _readable(overrides: Sequence[str]) -> str:
    """Write overrides as a folder's name: an = in it could not be given to an override of Hydra."""
    name = "_".join(item.replace("=", "-") for item in overrides)
    return re.sub(r"[^\w.+-]", "-", name) or "default"
