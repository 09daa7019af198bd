"""`--help` of a stage, read from the text of its files in `conf/`: what it does, examples, settings, groups, presets.

Hydra's own lists values without their comments, and first composes and imports all that the stage needs. This reads
text alone, and so it answers at once. In a conf/ file the comment at the head says what the stage does, with its
examples on lines that are indented; settings stand between the defaults list and the group `hydra`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.base.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
STAGES = ("harvest", "train")  # that a preset speaks to
LAUNCHER_GROUP = "hydra/launcher"  # the group of conf/ with what runs a sweep's jobs
FLAGS = ("--help", "-h")
_DEFAULT = re.compile(r"  - (?:(?P<group>[\w/]+): )?(?P<option>[\w${}.-]+)\s*(?:#.*)?")
_ENDING = """\
Flags
  -m, --multirun   a sweep: every combination of the values in comma lists, as in sae.k=16,32
  --cfg job        print the settings as they are after all overrides, and do nothing
  --help           this; with group=option beside it, that option's settings
  Completion in bash: source docs/complete.bash
"""


@dataclass(frozen=True)
class ConfigFile:
    """One file of conf/ as text.

    head: its comment lines at the top, without `#`. defaults: (group, option) of its defaults list; group is "" where
    the file builds on another of its own folder. body: the lines of its settings.
    """

    path: Path
    head: list[str]
    defaults: list[tuple[str, str]]
    body: list[str]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read a file of conf/."""
        lines = path.read_text(encoding="utf-8").splitlines()
        count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        head = [line[1:].removeprefix(" ") for line in lines[:count] if "@package" not in line]
        rest = lines[count:]
        matches = [_DEFAULT.fullmatch(line) for line in rest]
        defaults = [(match["group"] or "", match["option"]) for match in matches if match]
        defaults = [pair for pair in defaults if pair[1] != "_self_"]
        first = next((i + 1 for i, line in enumerate(rest) if line.strip() == "- _self_"), 0)
        end = next((i for i, line in enumerate(rest) if line == "hydra:"), len(rest))
        return cls(path, head, defaults, _trimmed(rest[first:end]))

    @property
    def examples(self) -> list[str]:
        """Return the indented lines of the head."""
        return [line.strip() for line in self.head if line.startswith("  ")]

    @property
    def prose(self) -> list[str]:
        """Return the head's other lines."""
        return [line for line in self.head if line.strip() and not line.startswith("  ")]

    def settings(self) -> list[str]:
        """Return the lines of its settings, those of the file it builds on first, where it does not set them anew."""
        base = [option for group, option in self.defaults if not group]
        if not base:
            return self.body
        own = {line.split(":")[0] for line in self.body}
        inherited = ConfigFile.read(self.path.with_name(f"{base[0]}.yaml")).settings()
        return [line for line in inherited if line.split(":")[0] not in own] + self.body


def _trimmed(lines: Sequence[str]) -> list[str]:
    """Leave out empty lines at both ends."""
    return "\n".join(lines).strip("\n").splitlines()


def group_options(group: str) -> list[str]:
    """List the options of a group: the files of its folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def group_choices(stage: ConfigFile, arguments: Sequence[str]) -> dict[str, str]:
    """Choose an option of each group of a stage: as the command line says, else as its defaults list does."""
    given = dict(argument.lstrip("+").split("=", 1) for argument in arguments if "=" in argument)
    choices: dict[str, str] = {}
    for group, option in stage.defaults:
        if not group or option == "null":
            continue
        wanted = given.get(group, option)
        reference = re.fullmatch(r"\$\{(\w+)\}", wanted)  # optimizer: ${sae} takes the option of the group sae
        choices[group] = choices[reference[1]] if reference else wanted
        if choices[group] not in group_options(group):
            raise UserError(f"{group}={wanted} is unknown: choose one of {', '.join(group_options(group))}")
    return choices


def preset_lines() -> dict[str, str]:
    """Return the first line of each preset that says what it is, by its name."""
    first: dict[str, str] = {}
    for name in group_options("experiment"):
        said = [line for line in ConfigFile.read(CONF / "experiment" / f"{name}.yaml").head if line.strip()]
        line = next((line for line in said if not line.startswith("python -m")), "")
        first[name] = textwrap.shorten(line.removeprefix("Source: "), 96, placeholder=" ...")
    return first


def help_text(stage: str, arguments: Sequence[str] = ()) -> str:
    """Write the help of conf/<stage>.yaml."""
    return "\n".join(_lines(ConfigFile.read(CONF / f"{stage}.yaml"), stage, arguments)) + "\n"


def _lines(config: ConfigFile, stage: str, arguments: Sequence[str]) -> Iterator[str]:
    yield from config.prose
    yield from ["", "Examples", *(f"  {example}" for example in config.examples)]
    yield from ["", f"Settings (conf/{stage}.yaml), given as name=value; null is nothing, [a,b] a list"]
    yield from (f"  {line}".rstrip() for line in config.body)
    for group, option in group_choices(config, arguments).items():
        file = ConfigFile.read(CONF / group / f"{option}.yaml")
        others = [name for name in group_options(group) if name != option]
        yield from ["", f"{group}={option}   or {', '.join(others)}"]
        yield from (f"  # {line}" for line in file.head)
        # A file that says where its settings go has the group's name in it.
        lead = "" if any(line.startswith(f"{group}:") for line in file.body) else f"{group}."
        yield from (f"  {lead if _names_a_setting(line) else ''}{line}".rstrip() for line in file.settings())
    if stage in STAGES:
        yield from _launchers(arguments)
        yield from ["", "Presets, each for harvest and train: +experiment=<name>"]
        yield from (f"  {name:<16} {line}" for name, line in preset_lines().items())
    yield from ["", *_ENDING.splitlines()]


def _launchers(arguments: Sequence[str]) -> Iterator[str]:
    """Write what may run the jobs, and the settings of the one that the command line names."""
    yield from ["", "hydra/launcher=<name>   how jobs are run"]
    for name in group_options(LAUNCHER_GROUP):
        file = ConfigFile.read(CONF / LAUNCHER_GROUP / f"{name}.yaml")
        yield f"  {name:<16} {file.prose[0]}"
        if f"{LAUNCHER_GROUP}={name}" in arguments:
            own = [line for line in file.body if _names_a_setting(line) and not line.startswith("_")]
            yield from (f"    hydra.launcher.{line}" for line in own)


def _names_a_setting(line: str) -> bool:
    return re.match(r"\w+:", line) is not None


def show_help(stage: str, arguments: Sequence[str]) -> bool:
    """Print the help where it is asked for; whether it was."""
    if not any(flag in arguments for flag in FLAGS):
        return False
    print(help_text(stage, [argument for argument in arguments if argument not in FLAGS]), end="")
    return True
