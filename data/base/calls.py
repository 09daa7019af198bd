"""Settings given in Python: keyword arguments, composed with `conf/` as the command line composes its overrides.

    harvest.harvest(sites=["resid_post.3"], tokens=2_000_000, **{"packing.context": 128})
    train.train(sae="topk", **{"sae.k": 16}, loader={"threads": 1})

A name stands for what it stands for on the command line: a group takes an option's name or its settings as a mapping,
dots go into a group, None is null, `experiment` names a preset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.base.errors import UserError

# What Hydra's grammar reads as a text without quotes: no number, no null, no flag, nothing that it splits at.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_./][\w./-]*", re.IGNORECASE | re.ASCII)
_WHOLE = ("device_map",)  # mappings that are one value, whose names are not settings


def overrides_of(given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Write keyword arguments as overrides of the command line; UserError for a value that no setting can take."""
    overrides: list[str] = []
    for name, value in given.items():
        dotted = prefix + str(name)
        if isinstance(value, Mapping) and dotted.rpartition(".")[2] not in _WHOLE:
            overrides += overrides_of(value, f"{dotted}.")
        else:
            added = "+" if dotted == "experiment" else ""
            overrides.append(f"{added}{dotted}={_written(dotted, value)}")
    return overrides


def _written(name: str, value: Any) -> str:
    """Write a value in Hydra's grammar, so that the same value is read back."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, str | Path):
        text = str(value)
        # A backslash is itself but before a quote, that of the end included.
        quoted = re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", text))
        return text if _PLAIN.fullmatch(text) else f"'{quoted}'"
    if isinstance(value, Mapping):
        pairs = (f"{key}:{_written(name, part)}" for key, part in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "[" + ",".join(_written(name, part) for part in value) + "]"
    raise UserError(
        f"{name} is given a {type(value).__name__}: give a number, a text, true, false, null, or a list of them"
    )


@contextmanager
def composed(stage: str, given: Mapping[str, Any]) -> Iterator[Any]:
    """Compose conf/<stage>.yaml with keyword arguments; within the context Hydra knows the job as if it had begun it.

    `out`, where it is not given, is the folder that the command line would take. A UserError in one sentence says what
    is wrong, as the command line would.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    from data.base.composing import guard
    from data.base.help import CONF

    guard()
    before = HydraConfig.instance().cfg
    with initialize_config_dir(str(CONF), version_base="1.3", job_name=stage):
        config = compose(stage, overrides_of(given), return_hydra_config=True)
        try:
            HydraConfig.instance().set_config(config)
            OmegaConf.set_readonly(config.hydra, False)
            config.hydra.runtime.output_dir = str(config.hydra.run.dir)
            HydraConfig.instance().set_config(config)
            settings = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
            with open_dict(settings):
                yield settings
        finally:
            HydraConfig.instance().cfg = before


def settings_of_call(stage: str, config: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved settings of a call: the whole configuration it was given, or `given` composed with conf/."""
    from omegaconf import DictConfig, OmegaConf

    from data.base.cli import stage_settings

    if config is None:
        with composed(stage, given) as made:
            return stage_settings(made, stage)
    refuse_both(given)
    if isinstance(config, DictConfig):
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        return {str(name): value for name, value in plain.items()}
    return {str(name): value for name, value in config.items()}


def refuse_both(given: Mapping[str, Any]) -> None:
    """Refuse keyword arguments beside a whole configuration."""
    if given:
        raise UserError(
            f"{', '.join(given)} came beside a whole configuration: put them into it, or give keyword arguments alone"
        )
