"""How each stage starts: one Hydra main, settings from `conf/`, one sentence and exit code 1 for a user's mistake."""

from __future__ import annotations

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
from data.base.errors import UserError, to_sentence
from data.base.help import CONF as CONF
from data.base.help import STAGES, show_help
from data.base.location import refuse_credentials
from data.base.logs import logged

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


@cache
def _known(stage: str) -> frozenset[str]:
    """Return the names of a stage's own settings; within a Hydra that is initialised."""
    return frozenset(map(str, hydra.compose(stage)))


def preset_settings(config: DictConfig, stage: str, schema: type[Settings] | None = None) -> dict[str, Any]:
    """Return a stage's settings of a composed preset (conf/experiment), resolved.

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


def stage_settings(config: DictConfig, stage: str, schema: type[Settings] | None = None) -> dict[str, Any]:
    """Return a stage's settings, resolved; of a preset, where one is asked for, what is of this stage."""
    if HydraConfig.initialized() and "experiment" in HydraConfig.get().runtime.choices:
        if schema is not None:
            _refuse_of_other_stages(HydraConfig.get().overrides.task, schema)
        return preset_settings(config, stage, schema)
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    return {str(name): value for name, value in settings.items()}


def _refuse_of_other_stages(overrides: Iterable[str], schema: type[Settings]) -> None:
    """Refuse what the command line gives beside a preset and the stage does not read."""
    for override in overrides:
        name = override.lstrip("+~").split("=")[0].split("@")[0]
        if name.split(".")[0] not in (*schema.model_fields, "experiment"):
            raise UserError(unknown(name, name.split("."), schema))


_FULL_ERROR = "HYDRA_FULL_ERROR"  # set to 1, Hydra raises errors that it would else print itself
_failed = False  # whether an error was printed that the process is to end with


def guarded(act: Callable[[], None]) -> None:
    """Do `act`; what a user can fix is printed in one sentence, and the process will end with exit code 1."""
    global _failed
    try:
        act()
    except Exception as error:
        sentence = to_sentence(error)
        if isinstance(error, HydraException | OmegaConfBaseException):
            sentence = f"the settings cannot be read ({str(error).splitlines()[0]}): check the command line"
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        _failed = True


def _show_help(config_name: str) -> None:
    """Print the help and end, where it is asked for."""
    if show_help(config_name, sys.argv[1:]):
        raise SystemExit(0)


def _end_if_failed() -> None:
    if _failed:
        raise SystemExit(1)


def run(main: Callable[[DictConfig], None], config_name: str, name_job: NameJob | None = None) -> None:
    """Run a stage's `main` under Hydra with `conf/<config_name>.yaml` and the command line's overrides.

    `name_job` names the folders of a sweep's jobs; without it Hydra does.
    """
    guarded(lambda: _show_help(config_name))
    _end_if_failed()
    keep_freed_memory()
    guard(name_job)
    guarded(lambda: refuse_credentials(" ".join(sys.argv[1:])))  # before Hydra writes them down
    guarded(lambda: refuse_flags(sys.argv[1:]))
    _end_if_failed()

    def job(config: DictConfig) -> None:
        raising = os.environ.pop(_FULL_ERROR, None)  # not for processes that the stage starts
        own = HydraConfig.get()
        # A stage without a folder of its own runs where it was started, and leaves nothing there.
        log = [] if own.output_subdir is None else [Path(own.runtime.output_dir) / f"{own.job.name}.log"]
        with logged(log):
            guarded(lambda: main(config))
        if raising is not None:
            os.environ[_FULL_ERROR] = raising
        _end_if_failed()

    under_hydra = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)
    guarded(lambda: _without_hydra_s_report(under_hydra))
    _end_if_failed()


def _without_hydra_s_report(act: Callable[[], None]) -> None:
    """Let errors out that Hydra would print with a traceback: of its output folder, say, which cannot be made."""
    if _FULL_ERROR in os.environ:  # a user's own wish
        act()
        return
    os.environ[_FULL_ERROR] = "1"
    try:
        act()
    finally:
        os.environ.pop(_FULL_ERROR, None)
