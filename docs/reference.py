"""The two pages that are written by the code: every setting, from conf/ and the schemas; every public name."""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from benchmarks.saebench.run import SAEBenchSettings
from data.base.help import CONF, ConfigFile, group_options, preset_lines
from data.slurm.settings import LAUNCHER, SlurmSettings
from evaluate.config import DelphiSettings, EvaluateSettings, ExplainSettings, FeaturesSettings, NeuronpediaSettings
from harvest.config import HarvestSettings
from harvest.documents import SOURCES
from harvest.lm import ModelSettings
from harvest.packing import Packing
from train.config import LoggerSettings, OptimizerSettings, TrainerSettings, TrainSettings
from train.interop.config import ExportSettings, ImportSettings
from train.publish import PublishSettings
from train.sae import VARIANTS

Schema = type[BaseModel]
STAGES: dict[str, Schema] = {
    "harvest": HarvestSettings,
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "features": FeaturesSettings,
    "explain": ExplainSettings,
    "neuronpedia": NeuronpediaSettings,
    "delphi": DelphiSettings,
    "saebench": SAEBenchSettings,
    "export": ExportSettings,
    "adopt": ImportSettings,
    "publish": PublishSettings,
}
GROUPS: dict[str, Schema] = {
    "model": ModelSettings,
    "packing": Packing,
    "optimizer": OptimizerSettings,
    "trainer": TrainerSettings,
    "logger": LoggerSettings,
}
_INTRODUCTION = (
    "Generated from `conf/` and the schemas that check it. Give a setting as `name=value` on the command line",
    '(`make train ARGS="sae=topk sae.k=32"`), or as a keyword argument from Python. A group takes an option by name',
    "(`sae=topk`) and its settings by dots (`sae.k=32`); `null` is nothing. `python -m train --help` shows the same.",
)
_SLIP = 10**9  # a bound from here on only stops a slip of the keyboard
PUBLIC = ("harvest", "train", "train.sae", "evaluate", "data")


def settings_page() -> str:
    """Write the page of all settings."""
    lines = ["# Settings", "", *_INTRODUCTION, ""]
    for stage, schema in STAGES.items():
        file = ConfigFile.read(CONF / f"{stage}.yaml")
        command, _, purpose = file.prose[0].partition(": ")
        lines += [
            f"## {command}",
            "",
            purpose[:1].upper() + purpose[1:],
            *file.prose[1:],
            "",
            "```",
            *file.examples,
            "```",
            "",
        ]
        lines += _table(schema, _defaults(stage))
    lines += ["## Groups", ""]
    for group, schema in GROUPS.items():
        lines += [f"### {group}", "", f"Options: {_listed(group_options(group))}.", ""]
        lines += _table(schema, {}, f"{group}.")
    lines += ["### hydra/launcher=slurm", "", "Jobs of a cluster: [how](slurm.md).", ""]
    lines += _table(SlurmSettings, {}, f"{LAUNCHER}.")
    lines += ["### text", "", f"Options: {_listed(group_options('text'))}.", ""]
    for kind, source in SOURCES.items():
        lines += [f"#### text.kind={kind}", "", *_table(source, {}, "text.")]
    lines += ["### sae", "", "`sae.expansion`: the width as a multiple of the site's, where `sae.width` is null.", ""]
    for name, variant in VARIANTS.items():
        file = ConfigFile.read(CONF / "sae" / f"{name}.yaml")
        lines += [f"#### sae={name}", "", *file.prose, "", *_table(variant.Config, _defaults(f"sae/{name}"), "sae.")]
    lines += ["## Presets", "", "| `+experiment=` | |", "| :-- | :-- |"]
    lines += [f"| `{name}` | {_cell(line)} |" for name, line in preset_lines().items()]
    return "\n".join(lines) + "\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _defaults(name: str) -> dict[str, Any]:
    """Read the values that a conf/ file gives."""
    plain = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in ("defaults", "hydra")}


def _table(schema: Schema, defaults: dict[str, Any], prefix: str = "") -> list[str]:
    """Write a table of a schema's settings, groups below it included."""
    rows = ["| setting | default | values | meaning |", "| :-- | :-- | :-- | :-- |"]
    return [*rows, *_rows(schema, defaults, prefix), ""]


def _rows(schema: Schema, defaults: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        meaning = _cell(field.description or "")
        if name in GROUPS or (name in ("text", "sae") and schema in (HarvestSettings, TrainSettings)):
            yield f"| `{prefix}{name}` | | a group | {meaning} See [below](#groups). |"
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(field.annotation, defaults.get(name) or {}, f"{prefix}{name}.")
        else:
            default = _value(defaults.get(name, _default(field)))
            yield f"| `{prefix}{name}` | `{default}` | {_cell(_values(field))} | {meaning} |"


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def _value(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(_value(part) for part in value)}]"
    return str(value).replace("${hydra:runtime.output_dir}", "the run's folder")


def _values(field: FieldInfo) -> str:
    """Write what a setting may be: its kind, or its choices, and its range."""
    bounds = {"ge": "{} or more", "gt": "above {}", "lt": "below {}", "le": "at most {}"}
    marks = [
        said.format(getattr(mark, name))
        for mark in field.metadata
        for name, said in bounds.items()
        if getattr(mark, name, None) is not None and abs(getattr(mark, name)) < _SLIP
    ]
    kinds = list(dict.fromkeys(_kinds(field.annotation)))
    return ", ".join([" or ".join(kinds), *marks])


_KINDS = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "a mapping",
}


def _kinds(annotation: Any) -> Iterator[str]:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        yield from (f"`{choice}`" for choice in inside)
    elif origin is typing.Annotated:
        yield from _kinds(inside[0])
    elif origin in (typing.Union, types.UnionType):
        for part in inside:
            yield from _kinds(part)
    elif origin in (list, tuple):
        yield "a list"
    else:
        yield _KINDS.get(origin or annotation, "text")


def _cell(text: str) -> str:
    """Write a text so that it stays in its cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def api_page() -> str:
    """Write the page of the public names of each package, from their signatures and docstrings."""
    lines = ["# Python", "", "Generated from docstrings. [Use from Python](python.md) shows them at work.", ""]
    for package in PUBLIC:
        module = importlib.import_module(package)
        lines += [f"## {package}", "", *_text(module), ""]
        for name in module.__all__:
            lines += _entry(package, name, getattr(module, name))
    return "\n".join(lines) + "\n"


def _entry(package: str, name: str, thing: Any) -> Iterator[str]:
    kind = "class " if inspect.isclass(thing) else ""
    if not callable(thing):
        yield from [f"### {package}.{name}", "", _listed(sorted(thing)) if isinstance(thing, dict) else "", ""]
        return
    yield from [f"### {package}.{name}", "", "```python", f"{kind}{name}{_signature(thing)}", "```", ""]
    yield from [*_text(thing), ""]
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        inner = getattr(value, "__func__", getattr(value, "func", getattr(value, "fget", value)))
        if not member.startswith("_") and inspect.isfunction(inner) and inner.__doc__:
            called = _signature(inner) if callable(value) or isinstance(value, classmethod | staticmethod) else ""
            yield from [f"**`{member}{called}`**", "", *_text(inner), ""]


def _signature(thing: Any) -> str:
    """Write a signature with its types as the source has them, without the package names of types."""
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return "(...)"
    return re.sub(r"\b(?:[a-z_]+\.)+([A-Z]\w*)", r"\1", text.replace("'", ""))


def _text(thing: Any) -> list[str]:
    return (inspect.getdoc(thing) or "").splitlines()
