"""How each stage starts: one Hydra main, settings from `conf/`, one sentence and exit code 1 for a user's mistake."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.base.composing import NameJob, guard, refuse_flags
from data.base.config import Settings, unknown
from data.base.errors import UserError
from data.storage.local import refuse_credentials

CONF = Path(__file__).resolve().parents[2] / "conf"
STAGES = ("harvest", "train")  # that a preset speaks to

# glibc gives large blocks back to the kernel at once and pays a page fault for each page of the next one.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let the C allocator keep and reuse large blocks (Linux with glibc; elsewhere nothing happens)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 256 << 20)


_CHOOSE = "choose another folder"
# Errors of the file system that a user can cause: what it says of the file, and what helps.
_REMEDIES = {
    errno.ENOSPC: ("cannot be written, as the disk is full", "free some space, then try again"),
    errno.EDQUOT: ("cannot be written, as your quota is used up", "free some space, then try again"),
    errno.EFBIG: ("is larger than files may be here", _CHOOSE),
    errno.EACCES: ("cannot be written or read with your permissions", f"change them or {_CHOOSE}"),
    errno.EPERM: ("cannot be written or read with your permissions", f"change them or {_CHOOSE}"),
    errno.EROFS: ("lies where nothing can be written", _CHOOSE),
    errno.ENOTDIR: ("goes through a file as if it were a folder", "check the path"),
    errno.EEXIST: ("is there already and is no folder", _CHOOSE),
    errno.EISDIR: ("is a folder where a file was expected", "check the path"),
    errno.ENOENT: ("does not exist", "check the path"),
    errno.ENAMETOOLONG: ("has a name that is too long", "choose a shorter one"),
    errno.ELOOP: ("is a link that leads back to itself", "check the path"),
    errno.EMFILE: ("cannot be opened beside so many others", "raise the limit (ulimit -n) or use fewer threads"),
    errno.ENFILE: ("cannot be opened, as the machine has too many files open", "end other programs"),
    errno.ENOMEM: ("cannot be read, as there is not enough memory", "use smaller sizes, or a machine with more"),
}


def sentence(error: Exception) -> str | None:
    """What to tell a user of this error, or None where it is a fault of the program and deserves its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        what, remedy = _REMEDIES[error.errno]
        return f"{error.filename or 'a file'} {what}: {remedy}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for this: use smaller sizes, or a machine with more"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return f"the settings cannot be read ({str(error).splitlines()[0]}): check the command line"
    return None


@cache
def _known(stage: str) -> frozenset[str]:
    """The names of a stage's own settings; within a Hydra that is initialised."""
    return frozenset(map(str, hydra.compose(stage)))


def own(config: DictConfig, stage: str, schema: type[Settings] | None = None) -> dict[str, Any]:
    """A stage's settings of a composed preset (conf/experiment), resolved.

    A preset speaks to several stages: of a setting written `name: {harvest: ..., train: ...}` a stage takes its own
    part, and it leaves what is another's alone. UserError names what no stage has. The stage's own settings are the
    fields of its `schema`, or without one the names in its conf/ file.
    """
    names = frozenset(schema.model_fields) if schema else _known(stage)
    settings: dict[str, Any] = {}
    for name in map(str, config):
        value = config[name]
        if name not in names:
            if not any(name in _known(other) for other in STAGES):
                raise UserError(f"the preset sets {name}, which no stage has: fix it in conf/experiment")
            continue
        by_stage = isinstance(value, DictConfig) and value.keys() <= set(STAGES) and len(value) > 0
        if by_stage and stage not in value:
            raise UserError(f"the preset sets {name} for other stages only: give {name}=... to {stage} too")
        if by_stage:
            value = value[stage]
        settings[name] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return settings


def settings_of(config: DictConfig, stage: str, schema: type[Settings] | None = None) -> dict[str, Any]:
    """A stage's settings, resolved; of a preset, where one is asked for, what is of this stage."""
    if HydraConfig.initialized() and "experiment" in HydraConfig.get().runtime.choices:
        if schema is not None:
            _refuse_of_other_stages(HydraConfig.get().overrides.task, schema)
        return own(config, stage, schema)
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    return {str(name): value for name, value in settings.items()}


def _refuse_of_other_stages(overrides: Iterable[str], schema: type[Settings]) -> None:
    """Refuse what the command line gives beside a preset and the stage does not read."""
    for override in overrides:
        name = override.lstrip("+~").split("=")[0].split("@")[0]
        if name.split(".")[0] not in (*schema.model_fields, "experiment"):
            raise UserError(unknown(name, name.split("."), schema))


_failed = False  # whether an error has been told that the process is to end with


def attempt(act: Callable[[], None]) -> None:
    """Do `act`; what a user can mend is told in one sentence, and the process will end with exit code 1."""
    global _failed
    try:
        act()
    except Exception as error:
        told = sentence(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        _failed = True


def run(main: Callable[[DictConfig], None], config_name: str, name_job: NameJob | None = None) -> None:
    """Run a stage's `main` under Hydra with `conf/<config_name>.yaml` and the command line's overrides.

    `name_job` names the folders of a sweep's jobs; without it Hydra does.
    """
    keep_freed_memory()
    guard(name_job)
    # Hydra then raises what it would print as a shortened traceback; `attempt` tells a mistake in a sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def job(config: DictConfig) -> None:
        attempt(lambda: main(config))
        if _failed:
            raise SystemExit(1)

    def begin() -> None:
        refuse_credentials(" ".join(sys.argv[1:]))  # before Hydra writes them down
        refuse_flags(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()

    attempt(begin)
    if _failed:
        raise SystemExit(1)
