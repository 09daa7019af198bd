"""The report's figures, one set a site: two curves against L0, the histograms of L0 and of the latents' densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]  # one SAE of the report

# Okabe and Ito's colours, told apart with any colour vision; each variant keeps its colour and marker in every figure.
STYLES = {
    "relu": ("#000000", "o"),
    "topk": ("#E69F00", "s"),
    "batchtopk": ("#0072B2", "^"),
    "matryoshka": ("#009E73", "D"),
    "gated": ("#CC79A7", "v"),
    "jumprelu": ("#D55E00", "P"),
}
OTHER = ("#56B4E9", "X")
LEGEND = 8  # lines a legend can name and still be read
WIDE = 4.0  # a quantity that spans more than this factor is drawn on a log axis


def families(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """(label, variant, rows in order of L0) of each line to draw: a variant, split by width where the widths differ."""
    several = len({row["width"] for row in rows}) > 1
    keys = sorted({(row["variant"], row["width"]) for row in rows})
    for variant, width in keys:
        label = f"{variant}, F={width:,}" if several else variant
        own = [row for row in rows if (row["variant"], row["width"]) == (variant, width)]
        yield label, variant, sorted(own, key=lambda row: float(row["metrics"]["l0"]["value"]))


def _log_if_wide(axes: Axes, name: str, values: list[float]) -> None:
    """Make the axis `name` ("x" or "y") logarithmic, its ticks plain numbers, where the values span a wide range."""
    if min(values, default=0.0) <= 0 or max(values) <= WIDE * min(values):
        return
    from matplotlib.ticker import LogLocator

    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def against_l0(rows: list[Row], metric: str, label: str, title: str) -> Figure:
    """One line a variant of `metric` against mean L0, with one standard error (bootstrap over sequences) each way; and
    the front of the SAEs that no other beats in both."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    rows = [row for row in rows if row["metrics"][metric]["value"] is not None]
    for name, variant, own in families(rows):
        colour, marker = STYLES.get(variant, OTHER)
        x, y = ([float(row["metrics"][m]["value"]) for row in own] for m in ("l0", metric))
        x_err, y_err = ([row["metrics"][m]["se"] or 0.0 for row in own] for m in ("l0", metric))
        axes.errorbar(x, y, y_err, x_err, label=name, color=colour, marker=marker, ms=7, lw=1.3, capsize=3, alpha=0.9)
    best = sorted(
        tuple(float(row["metrics"][m]["value"]) for m in ("l0", metric)) for row in rows if metric in row["pareto"]
    )
    if len(best) > 1:
        axes.plot(*zip(*best, strict=True), color="#888888", lw=5, alpha=0.3, zorder=0, label="Pareto front")
    for axis, name in (("x", "l0"), ("y", metric)):
        _log_if_wide(axes, axis, [float(row["metrics"][name]["value"]) for row in rows])
    axes.set(xlabel="L0 (mean latents active on a held-out token)", ylabel=label, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _shades(colour: str, count: int) -> list[tuple[float, float, float, float]]:
    """`count` shades of one colour, from pale (small L0) to full."""
    from matplotlib.colors import to_rgba

    red, green, blue, _ = to_rgba(colour)
    return (
        [(red, green, blue, alpha) for alpha in np.linspace(0.35, 1, count)] if count > 1 else [(red, green, blue, 1)]
    )


def panels(
    rows: list[Row], xlabel: str, ylabel: str, title: str, draw: Callable[[Axes, Row, Any, str], None]
) -> Figure:
    """A panel a variant (and width); `draw(axes, row, colour, label)` adds one SAE's line to its panel."""
    groups = list(families(rows))
    across = min(3, len(groups))
    down = math.ceil(len(groups) / across)
    figure = Figure(figsize=(1 + 3.3 * across, 0.8 + 2.5 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True)
    for axes, (name, variant, own) in zip(grid.flat, groups, strict=False):
        shades = _shades(STYLES.get(variant, OTHER)[0], len(own))
        for i, (row, shade) in enumerate(zip(own, shades, strict=True)):
            named = len(own) <= LEGEND or i in (0, len(own) - 1)
            draw(axes, row, shade, f"L0 {row['metrics']['l0']['value']:.1f}" if named else "_")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    for axes in grid.flat[len(groups) :]:
        axes.remove()
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def l0_histograms(rows: list[Row], title: str) -> Figure:
    """The share of held-out tokens by their number of active latents, as far as 99.9% of each SAE's tokens reach."""
    tops = [np.searchsorted(np.cumsum(h), 0.999 * sum(h)) for h in (row["l0"]["histogram"] for row in rows)]
    top = int(max(tops)) + 2
    edges = np.unique(
        np.linspace(0, top, 61).round()
    )  # whole numbers, so that no bin holds one L0 more than its neighbour

    def draw(axes: Axes, row: Row, colour: Any, label: str) -> None:
        counts = np.asarray(row["l0"]["histogram"], dtype=float)
        share, _ = np.histogram(np.arange(len(counts)), bins=edges, weights=counts / counts.sum())
        axes.stairs(share / np.diff(edges), edges - 0.5, color=colour, label=label, lw=1.4)
        axes.axvline(row["metrics"]["l0"]["value"], color=colour, lw=0.8, ls=":")

    return panels(
        rows, "L0 of a token (dotted: mean; the largest 0.1% are not drawn)", "share of tokens at each L0", title, draw
    )


def densities(rows: list[Row], tokens: int, title: str) -> Figure:
    """Latents by the share of held-out tokens on which they fire, on a log scale; the legend counts the silent ones."""
    edges = np.logspace(math.floor(math.log10(1 / tokens)), 0, 41)

    def draw(axes: Axes, row: Row, colour: Any, label: str) -> None:
        density = np.asarray(row["l0"]["fired"], dtype=float) / tokens
        counts, _ = np.histogram(density[density > 0], bins=edges)
        axes.stairs(counts, edges, color=colour, label=f"{label}, {row['l0']['silent']:,} silent", lw=1.4)
        axes.set_xscale("log")

    return panels(rows, "density (share of held-out tokens on which a latent fires)", "latents", title, draw)


def draw_site(site: dict[str, Any], folder: Path, stem: str) -> list[str]:
    """Write the figures of one site of the report to `folder`; their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, where = site["saes"], f"{site['model']}, {site['site']}, {site['tokens']:,} held-out tokens"
    figures = {
        "nmse": against_l0(rows, "nmse", "NMSE (0 is perfect, 1 the mean)", where),
        "ce-increase": against_l0(rows, "ce_increase", "CE increase when spliced in (nats)", where),
        "l0": l0_histograms(rows, where),
        "density": densities(rows, site["tokens"], where),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{stem}-{name}.png", dpi=130)
    return [f"{stem}-{name}.png" for name in figures]
