"""The report's figures, one set a site: two curves against L0, the histograms of L0 and of the latents' densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluate.report import series
from evaluate.report.series import OTHER, STYLES, ReportRow, families, is_wide

PNG_LEGEND = 8  # lines a legend can name and still be read


def _log_if_wide(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Make the axis `name` ("x" or "y") logarithmic, its ticks plain numbers, where the values span a wide range."""
    if not is_wide(values):
        return
    from matplotlib.ticker import LogLocator

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def plot_against_l0(rows: list[ReportRow], metric: str, label: str, title: str) -> Figure:
    """Plot one line a variant of `metric` against mean L0, with one standard error (bootstrap over documents) each
    way; and the front of the SAEs that no other beats in both."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    drawn = series.against_l0(rows, metric)
    for line in drawn.lines:
        colour, marker = STYLES.get(line.variant, OTHER)
        look: dict[str, Any] = {"color": colour, "marker": marker, "ms": 7, "lw": 1.3, "capsize": 3, "alpha": 0.9}
        axes.errorbar(line.l0, line.value, line.value_error, line.l0_error, label=line.label, **look)
    if len(drawn.front) > 1:
        look = {"color": "#888888", "lw": 5, "alpha": 0.3, "zorder": 0}
        axes.plot(*zip(*drawn.front, strict=True), label="Pareto front", **look)
    _log_if_wide(axes, "x", drawn.l0)
    _log_if_wide(axes, "y", drawn.value)
    axes.set(xlabel="L0 (mean latents active on a held-out token)", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _shades(colour: str, count: int) -> list[tuple[float, float, float, float]]:
    """Return `count` shades of one colour, from pale (small L0) to full."""
    from matplotlib.colors import to_rgba

    red, green, blue, _ = to_rgba(colour)
    return (
        [(red, green, blue, alpha) for alpha in np.linspace(0.35, 1, count)] if count > 1 else [(red, green, blue, 1)]
    )


def panels(
    rows: list[ReportRow], xlabel: str, ylabel: str, title: str, draw: Callable[[Axes, int, Any, str], None]
) -> Figure:
    """Draw a panel a variant (and width); `draw(axes, i, colour, label)` adds the line of `rows[i]` to its panel."""
    groups = list(families(rows))
    number = {id(row): i for i, row in enumerate(rows)}
    across = min(3, len(groups))
    down = math.ceil(len(groups) / across)
    figure = Figure(figsize=(1 + 3.3 * across, 0.8 + 2.5 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True)
    for axes, (name, variant, own) in zip(grid.flat, groups, strict=False):
        shades = _shades(STYLES.get(variant, OTHER)[0], len(own))
        for i, (row, shade) in enumerate(zip(own, shades, strict=True)):
            named = len(own) <= PNG_LEGEND or i in (0, len(own) - 1)
            draw(axes, number[id(row)], shade, f"L0 {row['metrics']['l0']['value']:.1f}" if named else "_")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    for axes in grid.flat[len(groups) :]:
        axes.remove()
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def l0_histograms(rows: list[ReportRow], title: str) -> Figure:
    """Plot the share of held-out tokens by their number of active latents,
    as far as 99.9% of each SAE's tokens reach."""
    drawn = series.l0_histogram(rows)
    edges = np.array([*drawn.first, drawn.first[-1] + drawn.step]) - 0.5

    def draw(axes: Axes, i: int, colour: Any, label: str) -> None:
        axes.stairs(drawn.shares[i], edges, color=colour, label=label, lw=1.4)
        axes.axvline(rows[i]["metrics"]["l0"]["value"], color=colour, lw=0.8, ls=":")

    return panels(
        rows, "L0 of a token (dotted: mean; the largest 0.1% are not drawn)", "share of tokens at each L0", title, draw
    )


def density_panels(rows: list[ReportRow], tokens: int, title: str) -> Figure:
    """Plot the latents by the share of held-out tokens on which they fire, on a log scale;
    the legend counts the silent ones."""
    drawn = series.densities(rows, tokens)

    def draw(axes: Axes, i: int, colour: Any, label: str) -> None:
        label = f"{label}, {rows[i]['l0']['silent']:,} silent"
        axes.stairs(drawn.counts[i], drawn.edges, color=colour, label=label, lw=1.4)
        axes.set_xscale("log")

    return panels(rows, "density (share of held-out tokens on which a latent fires)", "latents", title, draw)


def draw_site(site: dict[str, Any], folder: Path, stem: str) -> list[str]:
    """Write the figures of one site of the report to `folder`; their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, where = site["saes"], f"{site['model']}, {site['site']}, {site['tokens']:,} held-out tokens"
    figures = {
        "nmse": plot_against_l0(rows, "nmse", "NMSE (0 is perfect, 1 the mean)", where),
        "ce-increase": plot_against_l0(rows, "ce_increase", "CE increase when spliced in (nats)", where),
        "l0": l0_histograms(rows, where),
        "density": density_panels(rows, site["tokens"], where),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{stem}-{name}.png", dpi=130)
    return [f"{stem}-{name}.png" for name in figures]
