"""Templates filled with autoescape on, and JSON that stays data wherever a page holds it."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).resolve().parent / "templates"
_UNSAFE = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&"})


def safe_json(value: Any) -> str:
    """Write JSON that is also JavaScript and holds no character that ends or begins markup;
    ASCII only (so no U+2028)."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)


@cache
def environment() -> Environment:
    """Return the templates beside this module; a name that is not given is an error."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["json"] = lambda value: Markup(safe_json(value))
    return templates


def asset(name: str) -> Markup:
    """Read a style sheet or script of ours, to stand inline as it is."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def script_hash(script: str) -> str:
    """Compute what a Content-Security-Policy calls an inline script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def render(template: str, **values: Any) -> str:
    """Fill a template."""
    return environment().get_template(template).render(**values)
