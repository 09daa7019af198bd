"""Numbers as text whose digits agree with their error: the error in two significant digits, the value as far as it."""

from __future__ import annotations

import math

MOST_DECIMALS = 6  # a number whose error is smaller than these can show is written with an exponent


def decimals_of(error: float) -> int:
    """Return how many decimals show two significant digits of an error above 0, which rounding may have made larger."""
    return max(0, 1 - int(f"{error:.1e}".partition("e")[2]))


def measured(value: float, error: float | None) -> tuple[str, str]:
    """Format a value and its error, rounded alike; the error is empty where it is 0 or not known.

    A value without error has four significant digits, and no decimals where it is a whole number.
    """
    if not error or not math.isfinite(error):
        return plain(value), ""
    decimals = decimals_of(error)
    if decimals > MOST_DECIMALS:
        return plain(value), f"{error:.1e}"
    return f"{value:,.{decimals}f}", f"{error:,.{decimals}f}"


def with_interval(value: float, low: float, high: float, *, signed: bool = False) -> tuple[str, str]:
    """Format a value and its 95% interval with the digits that the standard error which fits the interval allows."""
    error = (high - low) / (2 * 1.96)
    decimals = decimals_of(error) if error > 0 else 0
    sign = "+" if signed else ""
    if not error or decimals > MOST_DECIMALS:
        return f"{value:{sign}.3g}", f"[{low:{sign}.3g}, {high:{sign}.3g}]"
    written = [f"{number:{sign},.{decimals}f}" for number in (value, low, high)]
    return written[0], f"[{written[1]}, {written[2]}]"


def plain(value: float, digits: int = 4) -> str:
    """Format so many significant digits, as a plain number where that is short; a whole number without decimals."""
    if float(value).is_integer() and abs(value) < 10 ** (digits + 2):
        return f"{value:,.0f}"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".removesuffix(".")
