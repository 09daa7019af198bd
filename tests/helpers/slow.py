"""Which of a test's parameters `make test` runs, and which are left to `make test-slow`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(fast: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Mark as slow the values that `fast` is not true of: the same proof, on a case of each kind and then on all."""
    marked = [value if fast(value) else pytest.param(*_as_row(value), marks=pytest.mark.slow) for value in values]
    assert any(fast(value) for value in values)
    return marked


def _as_row(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
