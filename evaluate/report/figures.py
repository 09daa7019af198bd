"""The report's figures for a browser: curves against L0, two kinds of histogram, the course of training."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from evaluate.report.png import OTHER, STYLES, WIDE, families
from evaluate.report.tables import asked, figure, sae_name

Json = dict[str, Any]

SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}
CURVES = {"nmse": "NMSE of the batch", "l0": "L0 of the batch", "dead": "dead latents", "lr": "learning rate"}
LEGEND = 12  # SAEs a legend can name and still be read
METRICS = "metrics.csv"  # in an SAE's folder, where training logged into one


def style(variant: str) -> tuple[str, str]:
    """Colour and marker of a variant, as in every other figure."""
    colour, marker = STYLES.get(variant, OTHER)
    return colour, SYMBOLS.get(marker, "x")


def axis(title: str, values: list[float], **more: Any) -> Json:
    """An axis, logarithmic where its values span a wide range."""
    wide = bool(values) and min(values) > 0 and max(values) > WIDE * min(values)
    ticks = {"dtick": "D2" if wide and max(values) < 100 * min(values) else 1, "tickformat": "~g"}
    return {"title": {"text": title}, **({"type": "log", **ticks} if wide else {}), **more}


def drawn(traces: list[Any], xaxis: Json, yaxis: Json, *, height: int = 420) -> Json:
    """A figure as plain JSON; colours of text and lines are set by the page, which knows whether it is dark."""
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
    found: Json = go.Figure(traces, layout).to_plotly_json()
    return found


def value_of(row: Json, metric: str) -> float | None:
    """A metric of an SAE; None where it is not known."""
    value = row["metrics"].get(metric, {}).get("value")
    return None if value is None else float(value)


def hover(row: Json, metric: str, label: str) -> str:
    """What is told of a point; plotly reads a little markup in it, so a folder's name is made harmless."""
    lines = [f"<b>{sae_name(row)}</b> {asked(row['settings'])}, {row['width']:,} latents"]
    for name, words in (("l0", "L0"), (metric, label)):
        entry = row["metrics"][name]
        error = "" if entry["se"] is None else f" ± {figure(entry['se'], 2)}"
        lines.append(f"{words} {figure(entry['value'])}{error}")
    return "<br>".join([*lines, row["folder"].replace("&", "&amp;").replace("<", "&lt;")])


def against_l0(rows: list[Json], metric: str, label: str) -> Json | None:
    """A line a variant and width of a metric against L0, with one standard error each way; None where none is known."""
    rows = [row for row in rows if value_of(row, metric) is not None]
    traces = []
    for name, variant, own in families(rows):
        colour, symbol = style(variant)
        points = {m: [value_of(row, m) for row in own] for m in ("l0", metric)}
        errors = {m: [row["metrics"][m]["se"] or 0.0 for row in own] for m in ("l0", metric)}
        traces.append(
            go.Scatter(
                **{"x": points["l0"], "y": points[metric], "name": name, "mode": "lines+markers"},
                error_x={"array": errors["l0"], "thickness": 1, "width": 3},
                error_y={"array": errors[metric], "thickness": 1, "width": 3},
                line={"color": colour, "width": 1.5},
                marker={"symbol": symbol, "size": 9},
                hovertext=[hover(row, metric, label) for row in own],
                hoverinfo="text",
            )
        )
    l0, y = ([float(row["metrics"][m]["value"]) for row in rows] for m in ("l0", metric))
    return drawn([*traces, frontier(l0, y)], axis("L0", l0), axis(label, y)) if traces else None


def frontier(l0: list[float], y: list[float]) -> go.Scatter:
    """Through the SAEs that no other one beats in both L0 and y (less is better)."""
    best: list[tuple[float, float]] = []
    for point in sorted(zip(l0, y, strict=True)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    look = {"mode": "lines", "line": {"color": "#8a8f98", "width": 1, "dash": "dot", "shape": "hv"}}
    return go.Scatter(x=[x for x, _ in best], y=[v for _, v in best], name="Pareto front", hoverinfo="skip", **look)


def lines(rows: list[Json]) -> Iterator[tuple[Json, Json]]:
    """Each SAE with how its own line is drawn: by variant, paler where its L0 is smaller.

    The legend names each SAE, or the variant and width alone where they are many.
    """
    for label, variant, own in families(rows):
        for row, opacity in zip(own, np.linspace(0.45 if len(own) > 1 else 1, 1, len(own)), strict=True):
            name = f"{sae_name(row)}, L0 {figure(row['metrics']['l0']['value'])}"
            look = {"line": {"color": style(variant)[0], "width": 1.6}, "opacity": float(opacity), "mode": "lines"}
            if len(rows) > LEGEND:
                look |= {"legendgroup": label, "showlegend": row is own[-1]}
                name = label if row is own[-1] else name
            yield row, {**look, "name": name}


def l0_histogram(rows: list[Json]) -> Json:
    """The share of tokens at each number of active latents, as far as 99.9% of each SAE's tokens reach.

    In at most 60 bins that hold as many numbers each.
    """
    tops = [int(np.searchsorted(np.cumsum(h), 0.999 * sum(h))) for h in (row["l0"]["histogram"] for row in rows)]
    step = max(1, math.ceil((max(tops) + 1) / 60))
    least = 0.5 / max(sum(row["l0"]["histogram"]) for row in rows)  # where no token is: below the share of one
    traces = []
    for row, look in lines(rows):
        counts = np.asarray(row["l0"]["histogram"], dtype=float)
        counts = np.pad(counts, (0, -len(counts) % step)).reshape(-1, step).sum(1)[: max(tops) // step + 1]
        share = (counts / sum(row["l0"]["histogram"]) / step).tolist()
        middle = np.arange(len(share)) * step + (step - 1) / 2
        look = look | {"line": look["line"] | {"shape": "hvh"}}
        look |= {"customdata": share, "hovertemplate": "L0 %{x}: %{customdata:.2%}"}
        traces.append(go.Scatter(x=middle.tolist(), y=np.maximum(share, least).tolist(), **look))
    # One L0 of TopK has nearly all its tokens, beside which the others' shares would not be seen on a linear axis.
    log = {"type": "log", "dtick": 1, "tickformat": "~%", "range": [math.log10(least), 0]}
    return drawn(traces, axis("L0 of a token", []), axis("share of tokens", [], **log))


def density_histogram(rows: list[Json], tokens: int) -> Json:
    """Latents by the share of tokens on which they fire; those that never do are not drawn."""
    edges = np.logspace(math.floor(math.log10(1 / tokens)), 0, 41)
    middle = np.sqrt(edges[1:] * edges[:-1]).tolist()
    traces = []
    for row, look in lines(rows):
        density = np.asarray(row["l0"]["fired"], dtype=float) / tokens
        counts, _ = np.histogram(density[density > 0], bins=edges)
        look = look | {
            "line": look["line"] | {"shape": "hvh"},
            "name": f"{look['name']}, {row['l0']['silent']:,} silent",
        }
        traces.append(go.Scatter(x=middle, y=counts.tolist(), hovertemplate="density %{x:.2g}: %{y} latents", **look))
    xaxis = axis("density (share of tokens it fires on)", [1 / tokens, 1])
    return drawn(traces, xaxis, axis("latents", []))


def logged(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each `train/` column of an SAE's metrics.csv; empty where there is no such file."""
    try:
        with (folder / METRICS).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return {}
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, text in row.items():
            if name.startswith("train/") and text and math.isfinite(value := float(text)):
                steps, values = found.setdefault(name.removeprefix("train/"), ([], []))
                steps.append(int(row["step"]))
                values.append(value)
    return found


def training_curves(rows: list[Json]) -> list[tuple[str, Json]]:
    """(title, figure) of each quantity of `CURVES` that any of the SAEs logged."""
    logs = [(logged(Path(row["folder"])), look) for row, look in lines(rows)]
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
