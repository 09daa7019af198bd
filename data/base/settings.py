"""Checks that the stages' settings share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.base.errors import UserError


def whole(settings: Mapping[str, Any], name: str, least: int) -> int:
    """Return a setting that counts something, `least` or more; 2e6 is a whole number too.
    UserError names what is not."""
    value = settings[name]
    # The comparison of a NaN or an infinity with itself comes before int(), which refuses both.
    if isinstance(value, bool) or not isinstance(value, int | float) or value - value != 0 or value != int(value):
        raise UserError(f"{name}={value} must be a whole number, {least} or more")
    if value < least:
        raise UserError(f"{name}={value} must be a whole number, {least} or more")
    return int(value)


def number(settings: Mapping[str, Any], name: str, least: float, most: float) -> float:
    """Return a setting that is a number from `least` to `most`; UserError names what is not."""
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"{name}={value} must be a number from {least:g} to {most:g}")
    return value
