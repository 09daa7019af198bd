"""The report's figures for a browser: curves against L0, two kinds of histogram, the course of training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from data.base.records import Json
from evaluate.report import series
from evaluate.report.columns import sae_name, sparsity_setting
from evaluate.report.digits import measured, plain
from evaluate.report.series import OTHER, STYLES, families, is_wide

SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}
CURVES = {"nmse": "NMSE of the batch", "l0": "L0 of the batch", "dead": "dead latents", "lr": "learning rate"}
PAGE_LEGEND = 12  # SAEs a legend can name and still be read


def style(variant: str) -> tuple[str, str]:
    """Colour and marker of a variant, as in every other figure."""
    colour, marker = STYLES.get(variant, OTHER)
    return colour, SYMBOLS.get(marker, "x")


def axis(title: str, values: list[float], **more: Any) -> Json:
    """Return an axis, logarithmic where its values span a wide range."""
    wide = is_wide(values)
    ticks = {"dtick": "D2" if wide and max(values) < 100 * min(values) else 1, "tickformat": "~g"}
    return {"title": {"text": title}, **({"type": "log", **ticks} if wide else {}), **more}


def drawn(traces: list[Any], xaxis: Json, yaxis: Json, *, height: int = 420) -> Json:
    """Return a figure as plain JSON; colours of text and lines are set by the page, which knows whether it is dark."""
    layout = {
        "template": "none",
        "height": height,
        "margin": {"l": 60, "r": 12, "t": 12, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "xaxis": {"automargin": True, "zeroline": False, **xaxis},
        "yaxis": {"automargin": True, "zeroline": False, **yaxis},
    }
    plain: Json = go.Figure(traces, layout).to_plotly_json()
    return plain


def hover(row: Json, metric: str, label: str) -> str:
    """Describe a point; plotly reads a little markup in it, so a folder's name is made harmless."""
    lines = [f"<b>{sae_name(row)}</b> {sparsity_setting(row['settings'])}, {row['width']:,} latents"]
    for name, words in (("l0", "L0"), (metric, label)):
        entry = row["metrics"][name]
        value, error = measured(entry["value"], entry["se"])
        lines.append(f"{words} {value} ± {error}" if error else f"{words} {value}")
    return "<br>".join([*lines, row["folder"].replace("&", "&amp;").replace("<", "&lt;")])


def figure_against_l0(rows: list[Json], metric: str, label: str) -> Json | None:
    """Draw a line a variant and width of a metric against L0, with one standard error each way;
    None where none is known."""
    numbers = series.against_l0(rows, metric)
    if not numbers.lines:
        return None
    traces = []
    for line in numbers.lines:
        colour, symbol = style(line.variant)
        traces.append(
            go.Scatter(
                x=line.l0,
                y=line.value,
                name=line.label,
                mode="lines+markers",
                error_x={"array": line.l0_error, "thickness": 1, "width": 3},
                error_y={"array": line.value_error, "thickness": 1, "width": 3},
                line={"color": colour, "width": 1.5},
                marker={"symbol": symbol, "size": 9},
                hovertext=[hover(row, metric, label) for row in line.rows],
                hoverinfo="text",
            )
        )
    # Through the SAEs that no other one beats in both.
    front = go.Scatter(
        x=[l0 for l0, _ in numbers.front],
        y=[value for _, value in numbers.front],
        name="Pareto front",
        hoverinfo="skip",
        mode="lines",
        line={"color": "#8a8f98", "width": 1, "dash": "dot", "shape": "hv"},
    )
    return drawn([*traces, front], axis("L0", numbers.l0), axis(label, numbers.value))


def lines(rows: list[Json]) -> Iterator[tuple[Json, Json]]:
    """Say for each SAE how its own line is drawn: by variant, paler where its L0 is smaller.

    The legend names each SAE, or the variant and width alone where they are many.
    """
    for label, variant, own in families(rows):
        for row, opacity in zip(own, np.linspace(0.45 if len(own) > 1 else 1, 1, len(own)), strict=True):
            name = f"{sae_name(row)}, L0 {plain(row['metrics']['l0']['value'], 3)}"
            look = {"line": {"color": style(variant)[0], "width": 1.6}, "opacity": float(opacity), "mode": "lines"}
            if len(rows) > PAGE_LEGEND:
                look |= {"legendgroup": label, "showlegend": row is own[-1]}
                name = label if row is own[-1] else name
            yield row, {**look, "name": name}


def l0_figure(rows: list[Json]) -> Json:
    """Draw the share of tokens at each number of active latents."""
    numbers = series.l0_histogram(rows)
    middle = [first + (numbers.step - 1) / 2 for first in numbers.first]
    shares = {id(row): share for row, share in zip(rows, numbers.shares, strict=True)}
    traces = []
    for row, look in lines(rows):
        share = shares[id(row)]
        look = look | {"line": look["line"] | {"shape": "hvh"}}
        look |= {"customdata": share, "hovertemplate": "L0 %{x}: %{customdata:.2%}"}
        # Where no token is, the line is drawn below the share of one.
        traces.append(go.Scatter(x=middle, y=np.maximum(share, numbers.least).tolist(), **look))
    # One L0 of TopK has nearly all its tokens, beside which the others' shares would not be seen on a linear axis.
    log = {"type": "log", "dtick": 1, "tickformat": "~%", "range": [math.log10(numbers.least), 0]}
    return drawn(traces, axis("L0 of a token", []), axis("share of tokens", [], **log))


def density_histogram(rows: list[Json], tokens: int) -> Json:
    """Draw the latents by the share of tokens on which they fire; those that never do are not drawn."""
    numbers = series.densities(rows, tokens)
    edges = np.array(numbers.edges)
    middle = np.sqrt(edges[1:] * edges[:-1]).tolist()
    counts = {id(row): own for row, own in zip(rows, numbers.counts, strict=True)}
    traces = []
    for row, look in lines(rows):
        look = look | {
            "line": look["line"] | {"shape": "hvh"},
            "name": f"{look['name']}, {row['l0']['silent']:,} silent",
        }
        own = counts[id(row)]
        traces.append(go.Scatter(x=middle, y=own, hovertemplate="density %{x:.2g}: %{y} latents", **look))
    xaxis = axis("density (share of tokens it fires on)", [1 / tokens, 1])
    return drawn(traces, xaxis, axis("latents", []))


def training_curves(rows: list[Json]) -> list[tuple[str, Json]]:
    """Return (title, figure) of each quantity of `CURVES` that any of the SAEs logged."""
    logs = [(series.training_log(Path(row["folder"])), look) for row, look in lines(rows)]
    figures = []
    for name, title in CURVES.items():
        own = [(log[name], look) for log, look in logs if name in log]
        if not own:
            continue
        traces = [
            go.Scatter(x=steps, y=values, hovertemplate="step %{x}: %{y:.4g}", **look) for (steps, values), look in own
        ]
        every = [value for (_, values), _ in own for value in values]
        figures.append((title, drawn(traces, axis("step", []), axis(title, every), height=360)))
    return figures
