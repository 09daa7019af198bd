"""Parts of the command lines that a stage prints, for the next stage."""

from __future__ import annotations

import shlex


def override(name: str, value: str) -> str:
    """Return `name=value` as a shell passes it on and Hydra reads it, whatever is in the value."""
    if any(letter in value for letter in " =,'\"{}[]()\\"):
        value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"  # as Hydra reads a quoted value
    return shlex.quote(f"{name}={value}")
