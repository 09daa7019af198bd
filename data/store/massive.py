"""Massive activations: a few rows of so large a norm that they, not the ordinary rows, are what an SAE would learn.

From some layer on many language models give one token of a context (mostly the first) 10 to 200 times the median norm.
The commit records show it for free, by the root mean square of a site's norms over their mean: 1.02 where all rows are
alike, 1.14 where the first of 256 has 10 times the norm, 6 where it has 155 times. Of 51 sites of SmolLM2-135M (with
and without a BOS), stories260K and the embedded model the rule below names the ten that have rows above 10 times the
median, and no other.
"""

from __future__ import annotations

from data.store.stats import Stats

TIMES_MEDIAN = 10.0
"""A row is massive where its norm is above so many times the median of its site."""
SPREAD = 1.1
"""The rms norm over the mean norm from which on a site is taken to have such rows,"""
LARGEST_ENTRY = 2.5
"""if its largest entry is also above so many times the mean norm: they stand out in a few fixed dimensions."""


def norm_spread(stats: Stats) -> float:
    """Return the root mean square of the norms over their mean; 1 where there is nothing to compare."""
    return stats.mean_sq_norm**0.5 / stats.mean_norm if stats.mean_norm else 1.0


def has_massive_rows(stats: Stats) -> bool:
    """Return whether a site's rows are so unlike in norm that the largest should be left out of training."""
    largest_entry = stats.max_abs / stats.mean_norm if stats.mean_norm else 0.0
    # A row is at least as long as its largest entry, so that one such entry proves a massive row, however rare.
    return largest_entry > TIMES_MEDIAN or (largest_entry > LARGEST_ENTRY and norm_spread(stats) >= SPREAD)


def massive_line(site: str, stats: Stats) -> str | None:
    """Return one line that warns of a site with massive activations and says what to do; None where it has none."""
    if not has_massive_rows(stats):
        return None
    return (
        f"{site} has massive activations (rms norm {norm_spread(stats):.2g} times the mean norm, largest entry "
        f"{stats.max_abs / stats.mean_norm:.2g} times it): train with outliers={TIMES_MEDIAN:g}, which leaves those "
        "rows out"
    )
