"""Settings composed by Hydra, once for all tests that ask for the same but for their own folders."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data.base.cli import CONF


@cache
def _composed(stage: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = OmegaConf.to_container(compose(stage, [*overrides]), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part, places) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, places) for part in value]
    return places.get(value, value) if isinstance(value, str) else copy.copy(value)


def composed(stage: str, overrides: tuple[str, ...], places: Mapping[str, object]) -> dict[str, Any]:
    """The stage's settings; the words of `places` in the overrides stand for what a test has for itself."""
    return dict(_filled(_composed(stage, overrides), {word: str(place) for word, place in places.items()}))
