"""The settings of an entry point as conf/ has them."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from data.base.cli import CONF


def stage_config(stage: str, **given: Any) -> dict[str, Any]:
    """The plain settings of conf/<stage>.yaml, some of them replaced."""
    loaded = OmegaConf.to_container(OmegaConf.load(CONF / f"{stage}.yaml"))
    assert isinstance(loaded, dict)
    own = {str(name): value for name, value in loaded.items() if name not in ("defaults", "hydra")}
    return {**own, **given}
