"""Hydra's composition of settings, guarded: nothing it reads may name what is called, and its errors are sentences.

Hydra calls whatever a `_target_` or a logging `class` names, in its own group `hydra` while it composes, before a stage
has seen its settings. Settings come from files of others too (presets, run folders), so the names are a closed table.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import hydra._internal.hydra as hydra_internals
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.base.errors import UserError

_BASIC = "hydra._internal.core_plugins.basic"
SLURM = "hydra_plugins.slurm.SlurmLauncher"
# All that Hydra may call by a name in its settings.
CALLED = {
    "launcher._target_": (
        "hydra_plugins.together.SinglePassLauncher",
        SLURM,
        f"{_BASIC}_launcher.BasicLauncher",
    ),
    "sweeper._target_": (f"{_BASIC}_sweeper.BasicSweeper",),
}
LOGGING = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter")
LOGGING_GROUPS = ("job_logging", "hydra_logging")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"
# Hydra's own name for a job's folder in conf/: the one that a stage's own naming takes the place of.
_OVERRIDES_AS_NAME = "${hydra:job.override_dirname}"

# Names a job's folder in a sweep: from its overrides, the names of those that the sweep varies, the sweep's folder.
NameJob = Callable[[Sequence[str], frozenset[str], str], str]


def refuse_calls(own: Mapping[str, Any]) -> None:
    """Refuse what would be called by its name; `own` is the composed group `hydra`, its interpolations not resolved."""
    for name in ("callbacks", "job.env_set"):
        value: Any = own
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value:
            raise UserError(f"hydra.{name} is set, and no setting may run or steer other code: leave it out")
    for path, value in _leaves(own):
        group, key = path.split(".")[0], path.rpartition(".")[2]
        text = value if isinstance(value, str) else ""
        refused = key in ("_target_", "()", ".") and text not in CALLED.get(path, ())
        if group in ("launcher", "sweeper"):
            refused = refused or "${" in text  # it could bring a _target_ from elsewhere
        if group in LOGGING_GROUPS:
            refused = refused or (key == "class" and text not in LOGGING)
            refused = refused or ("://" in text and text not in _STREAMS)
            refused = refused or ("${" in text and text != _LOG_FILE)
        if refused:
            raise UserError(f"hydra.{path}={value} could call any code by its name: leave it out")


def refuse_launcher(own: DictConfig, stage: str | None) -> None:
    """Refuse a launcher of ours where nothing would look at it; `own` is the composed group `hydra`."""
    sweep = own.mode == RunMode.MULTIRUN
    target = str(own.launcher.get("_target_"))
    if sweep and stage != "train" and target.startswith("hydra_plugins."):
        raise UserError(f"hydra/launcher={own.runtime.choices['hydra/launcher']} is for sweeps of train: leave out -m")
    if not sweep and stage != "harvest" and target == SLURM:
        raise UserError("hydra/launcher=slurm is for a harvest and for train -m: leave it out here, or add -m to train")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings and lists by its dotted path."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}.{index}")
    else:
        yield path, value


def refuse_flags(arguments: Sequence[str]) -> None:
    """Refuse command-line flags and folders that load code: pickled jobs, packages, another main configuration."""
    flags = get_args_parser().parse_args(list(arguments))
    if flags.experimental_rerun is not None:
        raise UserError("--experimental-rerun loads a pickle, which may hold any code: give the settings instead")
    if flags.config_path is not None or flags.config_name is not None:
        raise UserError("--config-path and --config-name would replace the stage's settings: use --config-dir=<folder>")
    if any("pkg://" in argument for argument in arguments):
        raise UserError("pkg:// would import a package: name a folder with --config-dir=<folder>")


class GuardedLoader(ConfigLoaderImpl):
    """Composes as Hydra does, and then looks before Hydra acts on it."""

    name_job: NameJob | None = None

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        try:
            config = super().load_configuration(config_name, overrides, *args, **kwargs)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(self._sentence(error, config_name, overrides)) from None
        refuse_calls(_plain(config.hydra))
        refuse_launcher(config.hydra, config_name)
        return config

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Return one job's settings; its folder is named by `name_job`, unless hydra.sweep.subdir was given."""
        own = _plain(master_config.hydra)
        if self.name_job is not None and own["sweep"]["subdir"] == _OVERRIDES_AS_NAME:
            excluded = frozenset(own["job"]["config"]["override_dirname"]["exclude_keys"])
            name = self.name_job(sweep_overrides, swept(own) - excluded, str(master_config.hydra.sweep.dir))
            sweep_overrides = [*sweep_overrides, f"hydra.sweep.subdir='{name}'"]
        return super().load_sweep_config(master_config, sweep_overrides)

    def _sentence(self, error: Exception, config_name: str | None, overrides: Sequence[str]) -> str:
        """Return one sentence for settings that do not compose."""
        lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
        missing = re.search(r"Could not find '(?:(\S+)/)?([^'/]+)'", lines[0])
        if missing is not None:
            options = [line for line in lines if "/" not in line and " " not in line and line != missing[2]]
            choice = f"choose one of {', '.join(options)}" if options else "check the name"
            return f"{missing[1] or '+experiment'}={missing[2]} is unknown: {choice}"
        strange = re.match(r"Could not (?:override|delete from config\.) '([^']+)'", lines[0])
        if strange is None:
            cause = lines[0].removeprefix("LexerNoViableAltException: ").rstrip(".")
            quoted = "a value with special characters needs quotes of its own, as in 'name=\"<value>\"'"
            return f"the settings cannot be read ({cause}): {quoted}"
        group = strange[1].split(".")[0]
        if any(self._has(strange[1], choice, config_name) for choice in _swept_choices(group, overrides)):
            # Hydra composes a sweep once with the default of each group before it composes any job.
            return (
                f"{strange[1]} is no setting of the {group} that is the default, with which a sweep over {group} is "
                f"composed first: write ++{strange[1]}=<value>"
            )
        return f"{strange[1]} is no setting: {self._hint(strange[1], config_name)}"

    def _has(self, name: str, choice: str, config_name: str | None) -> bool:
        """Return whether there is a setting of this name with `choice`, a group's override such as sae=relu."""
        try:
            composed = super().load_configuration(config_name, [choice], RunMode.MULTIRUN)
        except (HydraException, OmegaConfBaseException):
            return False
        return name in {path for path, _ in _leaves(OmegaConf.to_container(composed, resolve=False))}

    def _hint(self, name: str, config_name: str | None) -> str:
        """Name the nearest setting there is."""
        known = super().load_configuration(config_name, [], RunMode.MULTIRUN)
        names = [path for path, _ in _leaves(OmegaConf.to_container(known, resolve=False))]
        names += [path.rpartition(".")[0] for path in names]
        near = difflib.get_close_matches(name, names, 1, 0.6)
        near = near or [path for path in names if path.rpartition(".")[2] == name.rpartition(".")[2]]
        near = near or [path for path in names if difflib.get_close_matches(name, [path.rpartition(".")[2]], 1, 0.75)]
        return f"did you mean {near[0]}?" if near else "leave it out"


def _plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration with its interpolations as they are written."""
    whole = OmegaConf.to_container(config, resolve=False)
    assert isinstance(whole, dict)
    return {str(name): value for name, value in whole.items()}


def swept(own: Mapping[str, Any]) -> frozenset[str]:
    """Return the names that a sweep gives several values, on the command line or in hydra.sweeper.params."""
    given = list(own["overrides"]["task"])
    params = own["sweeper"].get("params") or {}
    parser = OverridesParser.create()
    several = {parsed.key_or_group for parsed in parser.parse_overrides(given) if parsed.is_sweep_override()}
    values = {str(name): parser.parse_override(f"{name}={value}") for name, value in params.items()}
    return frozenset(several | {name for name, parsed in values.items() if parsed.is_sweep_override()})


def _swept_choices(group: str, overrides: Sequence[str]) -> list[str]:
    """List the overrides group=choice of the sweep over a group; none where the command line does not sweep it."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    over = [one for one in parsed if one.is_sweep_override() and one.key_or_group == group]
    return [f"{group}={choice}" for one in over for choice in one.sweep_string_iterator()]


def guard(name_job: NameJob | None = None) -> None:
    """Let Hydra compose through `GuardedLoader` from now on; `name_job` names the folders of a sweep's jobs."""
    GuardedLoader.name_job = staticmethod(name_job) if name_job else None
    # Hydra has no seam for its loader; it takes the one of this name, in the one version that pyproject.toml allows.
    vars(hydra_internals)["ConfigLoaderImpl"] = GuardedLoader
