"""What stands in a run's folder: its record, its checkpoint, the lock of its one writer, and the step to go on from."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from data.base.config import Settings, Whole
from data.base.errors import UserError
from data.base.files import write_atomic
from data.base.records import canonical, diff_fields
from train.config import Group, TrainSettings, named_groups, of_scope, scope_of_override

if TYPE_CHECKING:
    from train.plan import DataPlan

RUN = "run.json"
REVIVED_BY_BIAS = ("relu", "gated", "jumprelu")  # variants with the setting `revive`
LAST = Path("checkpoints") / "last.ckpt"  # below the folder of a run
_LOCK = Path("checkpoints") / "lock"
_PARTS = frozenset({"step", "sae", "dead", "optimizer", "rng", "figures", "loader", "run", "seal"})
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunRecord(Settings):
    """run.json: what a run was asked for and what determines its numbers."""

    settings: Group
    """Checked settings, as TrainSettings gives them."""
    numbers: Group
    """What determines its numbers."""
    stored_chunks: Whole = Field(ge=0)
    """Chunks of train/ that the store held as the run began."""


# The record


def numbers(settings: TrainSettings, plan: DataPlan) -> Group:
    """Return what determines the numbers of a run, the store's identity with it."""
    # Settings that set no number (the folder, the pace, the logger) may differ between a run and its continuation.
    own = of_scope(settings, "sae", "stream")
    # Runs from before these settings say nothing of them.
    own["sae"] = {name: value for name, value in own["sae"].items() if value or name not in ("skip", "revive")}
    stores = list(dict.fromkeys(site.store.manifest.fingerprint for site in plan.joined))
    if len(stores) > 1:
        own["stores"] = stores
    if plan.outliers and plan.outliers.by_target:
        # A run of an earlier version left these rows in: it is another one.
        own["left_out_by_target"] = plan.outliers.by_target
    return {**own, "store": plan.store.manifest.fingerprint, "world": plan.world}


def fingerprint(settings: TrainSettings, plan: DataPlan) -> str:
    """Compute a short hash of the numbers of a run, which its checkpoint carries."""
    return hashlib.sha256(canonical(_comparable(numbers(settings, plan))).encode()).hexdigest()[:16]


def _comparable(value: Any) -> Any:
    """Strip nested mappings of what is null (the default of a setting that is newer than the run), 1.0 as 1."""
    if isinstance(value, Mapping):
        return {name: _comparable(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_comparable(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def write_run(folder: Path, settings: TrainSettings, plan: DataPlan) -> None:
    """Write run.json, whole or not at all."""
    record = RunRecord(
        settings=settings.model_dump(mode="json"), numbers=numbers(settings, plan), stored_chunks=plan.stored_chunks
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / RUN, canonical(record.model_dump(mode="json")) + "\n")


def read_run(folder: Path) -> RunRecord:
    """Read run.json; UserError where it is not one of ours. Names in it choose from closed tables and call nothing."""
    path = folder / RUN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = RunRecord.of(content)
    except (ValueError, AttributeError, RecursionError):  # no JSON, no object, or not our fields; UserError is one
        raise UserError(f"{path} is damaged: remove the folder and train anew") from None
    try:
        named = named_groups(record.settings), named_groups(record.numbers)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return record.model_copy(update={"settings": named[0], "numbers": named[1]})


def stored_chunks(folder: Path) -> int | None:
    """Read how much of the store the run in `folder` began with; None where it left nothing to go on from."""
    from train.sae.io import CONFIG

    # A run.json alone is of a run that died before its first checkpoint: a new one may begin in its place.
    left_something = (folder / LAST).is_file() or (folder / CONFIG).is_file()
    return read_run(folder).stored_chunks if left_something else None


# Going on


def resumed(given: Mapping[str, Any], overrides: Sequence[str]) -> Group:
    """Read the settings of the run that `resume` names;
    only what changes no number may be given anew, and the places."""
    folder = Path(str(given["resume"]))
    if not (folder / RUN).is_file():
        raise UserError(f"resume={folder} is not the folder of a training run (it has no {RUN}): give one that has")
    if not (folder / LAST).is_file():
        raise UserError(f"{folder / LAST} is missing, so there is nothing to go on from: train anew")
    # From the run, not from the command: a setting whose default has changed since must not change the run.
    saved: Group = dict(read_run(folder).settings)
    if saved["sae"].get("variant") in REVIVED_BY_BIAS:
        saved["sae"] = {"revive": 0, **saved["sae"]}  # which runs from before the setting trained with
    for override in overrides:
        name = override.lstrip("+~").split("=")[0]
        if name == "resume":
            continue
        scope = scope_of_override(override)
        # A store may have been moved; that it is the same one is checked by its fingerprint.
        free = name in ("cache", "store") or (scope is not None and not scope.sets_numbers and name != "out")
        if not free:
            raise UserError(f"resume takes its settings from the run and would ignore {override}: leave it out")
        group, _, key = name.partition(".")
        if key and isinstance(saved.get(group), Mapping) and isinstance(given[group], Mapping) and key in given[group]:
            saved[group] = {**saved[group], key: given[group][key]}
        else:
            saved[group] = given[group]
    try:
        TrainSettings.of({**saved, "out": str(folder)})
    except UserError as error:
        raise UserError(f"{folder / RUN}: {error}") from None
    return {**saved, "out": str(folder), "resume": None}


def step_to_resume(folder: Path, settings: TrainSettings, plan: DataPlan) -> int | None:
    """Find the step from which the run in `folder` goes on, 0 for a new one, None where it is done.

    UserError names the fields in which another run stands there.
    """
    from train.sae.io import CONFIG

    done, begun = (folder / CONFIG).is_file(), (folder / LAST).is_file()
    if not (folder / RUN).is_file():
        if done:
            raise UserError(f"{folder} holds an SAE already: choose another folder with hydra.run.dir=<folder>")
        return 0
    there, here = (_comparable(side) for side in (read_run(folder).numbers, numbers(settings, plan)))
    fields = diff_fields(there, here)
    if fields and (done or begun):
        raise UserError(
            f"{folder} holds another run ({'; '.join(fields)}): choose another folder with hydra.run.dir=<folder>, "
            "or remove that one"
        )
    if done:
        return None
    return int(read_checkpoint(folder, settings, plan, mapped=True)["step"]) if begun else 0


# The checkpoint


def checkpoint_seal(state: Mapping[str, Any]) -> str:
    """Compute a hash over what must agree in a checkpoint: its run, its step and the place in the data."""
    return hashlib.sha256(canonical([state["run"], state["step"], state["loader"]]).encode()).hexdigest()[:16]


def read_tensors(path: Path, mapped: bool = False) -> Any:
    """Read what torch.save wrote, None where it is damaged;
    `mapped`: its tensors stay on the disk until they are used."""
    import torch

    try:
        with zipfile.ZipFile(path) as parts:
            # torch.save writes a zip whose parts have a CRC each; torch.load itself does not look at them.
            whole = parts.testzip() is None
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped) if whole else None
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, NotImplementedError):
        return None


def read_checkpoint(folder: Path, settings: TrainSettings, plan: DataPlan, mapped: bool = False) -> Group:
    """Read a run's last.ckpt; UserError where it is damaged, edited, incomplete or another run's.

    `mapped`: its tensors stay on the disk until they are used. Only tensors and plain types are loaded, never code.
    Of a split dictionary this is the index.
    """
    from train.shards import OF_PART, SHARDS

    path = folder / LAST
    remedy = "remove the folder and train anew"
    state = read_tensors(path, mapped)
    if not isinstance(state, dict):
        raise UserError(f"{path} is damaged, so there is nothing to go on from: {remedy}")
    needed = _PARTS | ({"average"} if settings.ema is not None else frozenset())
    if SHARDS in state:  # an index of files with a part of the latents each, checked as they are read
        needed -= set(OF_PART)
    if missing := sorted(needed - state.keys()):
        raise UserError(f"{path} lacks its part {missing[0]} (an earlier version wrote it, or it was edited): {remedy}")
    # A checkpoint copied from another folder loads without complaint if the shapes agree. Its run's hash tells.
    if state["run"] != fingerprint(settings, plan):
        raise UserError(f"{path} is of another run than {folder / RUN}: put its own back, or {remedy}")
    step = state["step"]
    if type(step) is not int or not 0 < step <= plan.steps or state["seal"] != checkpoint_seal(state):
        raise UserError(f"{path} says step {step!r}, which does not agree with the rest of it: {remedy}")
    return state


# The lock


def first_rank() -> bool:
    """Return whether this process is the one of its ranks that writes; by what torchrun, Slurm or Lightning set."""
    # Global ranks first: LOCAL_RANK is 0 once on every host.
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in os.environ:
            return os.environ[name] == "0"
    return True


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the one training that writes into `folder`, or raise UserError; the kernel frees it if the process dies."""
    import fcntl

    path = folder / _LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    # Over NFS an exclusive lock needs a file that is open for writing.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being written by another training: wait for it, or choose another folder with "
                "hydra.run.dir=<folder>"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"{folder} lies where files cannot be locked: start no other training into it", file=sys.stderr)
        yield
    finally:
        os.close(descriptor)
