"""Crosscoders in a report: their error at each site and over all, and at which sites their latents write.

Both renderers (markdown.py, page.py) read titles, sentences, rows and series from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.base.records import Json
from evaluate.report.columns import BY_KEY
from evaluate.report.digits import plain

HEADS = ("site", "NMSE", "CE increase", "recovered zero", "latents of it alone", "mean share of the decoder norm")
METRICS = tuple(BY_KEY[key] for key in ("nmse", "ce_increase", "recovered_zero"))


def crosscoder_title(entry: Json) -> str:
    """Name the crosscoder by its folder, variant and sites."""
    return f"Crosscoder {entry['name']}"


def crosscoder_sentences(entry: Json) -> list[str]:
    """Say how well it reconstructs all sites, and how its latents divide among them."""
    fired = entry["latents"] - entry["silent"]
    return [
        f"NMSE over all sites {plain(entry['nmse'], 4)}, each in its normalised units, as the loss weighs them; L0"
        f" {plain(entry['l0']['value'], 4)}, counted once for all sites.",
        f"Of {fired:,} latents that fire on the text {entry['shared']:,} are shared, as at every site the norm of their"
        " decoder row is at least half of an even part of the sum over sites;"
        f" {sum(site['only'] for site in entry['sites']):,} have more than 0.9 of the sum at one site,"
        f" {entry['between']:,} are between. {entry['silent']:,} of {entry['latents']:,} never fire.",
        "NMSE and CE at a site: all sites are read untouched, and the reconstruction of this one alone takes the place"
        " of its rows.",
    ]


def crosscoder_cells(entry: Json) -> list[tuple[str, list[Json], int, float | None]]:
    """Give for each site its name, its statistics by `METRICS`, how many latents are its alone, and the mean share."""
    return [
        (site["site"], [site[column.key] for column in METRICS], site["only"], site["share"]) for site in entry["sites"]
    ]


def share_histogram(entry: Json) -> tuple[str, list[float], list[int]] | None:
    """Give the axis' title, the edges of the bins and the latents in each, by the share of the second of two sites;
    None for more sites, where no one share says it all."""
    if len(entry["sites"]) != 2:
        return None
    first, second = (site["site"] for site in entry["sites"])
    counts = entry["sites"][1]["histogram"]
    title = f"share of {second} in a latent's decoder norm (0: {first} alone)"
    return title, np.linspace(0, 1, len(counts) + 1).tolist(), counts


def draw_shares(entry: Json, path: Path) -> bool:
    """Draw the histogram of shares as a PNG; False where there is none."""
    from matplotlib.figure import Figure

    drawn = share_histogram(entry)
    if drawn is None:
        return False
    title, edges, counts = drawn
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.stairs(counts, edges, fill=True, color="#4477aa")
    axes.set(xlabel=title, ylabel="latents", title=entry["name"])
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def share_figure(entry: Json) -> Any:
    """Draw the same histogram for a browser; None where there is none."""
    import plotly.graph_objects as go

    from evaluate.report.figures import axis, drawn

    series = share_histogram(entry)
    if series is None:
        return None
    title, edges, counts = series
    width = edges[1]
    middle = [edge + width / 2 for edge in edges[:-1]]
    bars = go.Bar(x=middle, y=counts, width=width, marker={"color": "#4477aa"}, hovertemplate="%{x:.2f}: %{y} latents")
    return drawn([bars], axis(title, []), axis("latents", []), height=320)
