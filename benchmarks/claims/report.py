"""The claims' report: `claims.md` for reading, `claims.json` with every comparison, `plots/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.claims.bench import CE, METRICS, NMSE, Bench, Part
from benchmarks.claims.scores import Scored
from benchmarks.claims.topk import named, shown
from benchmarks.claims.verdict import Cell
from data.base.files import write_atomic
from data.base.records import Json
from evaluate.report.markdown import dumps, number, table
from evaluate.report.png import against_l0

FORMAT = 1
SWEEPS = ("topk", "batchtopk", "gated", "jumprelu", "relu")
RULES = (
    "Every interval is of 95%, by paired bootstrap over contexts; where a claim has several seeds, their spread is"
    " added in quadrature, and where it has one, that spread is not in it. A claim holds where every comparison's"
    " interval lies on its side, does not hold where one lies on the other side, and is undecided otherwise."
    " Differences of NMSE are relative, of CE increase in nats. Where two variants meet at an L0 that one of them was"
    " not trained at, it is read off the line between its neighbours in log-log, whose error is not in the interval."
)


def write(bench: Bench, parts: Sequence[Part], place: Json, out: Path) -> Path:
    """Write the report into `out`; the path of `claims.md`, which is written last."""
    plots = draw(
        bench, out / "plots", f"{place['model']}, {place['site']}, {place['heldout_tokens']:,} held-out tokens"
    )
    saes = [_row(sae) for sae in (*bench.main, *bench.special)]
    told = [
        {"claim": part.claim, "statement": part.statement, "verdict": part.verdict, "notes": part.notes}
        | {"cells": [asdict(cell) for cell in part.cells], "table": part.table, "extent": part.extent()}
        for part in parts
    ]
    write_atomic(out / "claims.json", dumps({"format": FORMAT, "place": place, "parts": told, "saes": saes}))
    write_atomic(out / "claims.md", markdown(parts, place, plots, [*bench.main, *bench.special]))
    return out / "claims.md"


def _row(sae: Scored) -> Json:
    """An SAE as evaluate's own report has it, for its figures too; None for a figure that is not finite."""
    metrics = {}
    for name in ("l0", "ev", "gamma", "recovered_zero", *METRICS):
        one = sae.figure(name)
        pair = one.value, float(np.std(one.drawn_M))
        metrics[name] = {what: x if np.isfinite(x) else None for what, x in zip(("value", "se"), pair, strict=True)}
    kept = {"variant": sae.variant, "form": sae.form, "width": sae.width, "seed": sae.seed, "settings": sae.settings}
    training = {name: sae.training[name] for name in ("tokens", "batch", "dead", "dead_after")}
    return {**kept, "folder": str(sae.folder), "training": training, "metrics": metrics, "l0": sae.firing, "pareto": []}


def markdown(parts: Sequence[Part], place: Json, plots: Sequence[str], saes: Sequence[Scored]) -> str:
    """The whole report."""
    head = (
        f"# The papers' claims on {place['model']}, {place['site']}\n\n"
        f"Width {place['d_model']:,}; {len({sae.folder for sae in saes})} SAEs, in the form that ships but where"
        f" another is named ({len(saes)} in all), scored on"
        f" the same {place['heldout_tokens']:,} held-out tokens ({place['sequences']:,} contexts of"
        f" {place['context']}).\n\n{RULES}"
    )
    rows = [[f"{p.claim}: {p.statement}", f"**{p.verdict}**", p.notes[0], *_extent(p)] for p in parts]
    summary = table(["claim", "verdict", "comparisons", "widths", "training tokens", "seeds"], rows)
    figures = "\n\n".join(f"![{Path(name).stem}](plots/{name})" for name in plots)
    detail = "\n\n".join(_section(part) for part in parts if part.cells or part.table)
    return "\n\n".join([head, summary, figures, "## Comparisons", detail, "## SAEs", _saes_table(saes)]) + "\n"


def _extent(part: Part) -> list[str]:
    told = part.extent()
    return [", ".join(f"{value:,}" for value in told[name]) for name in ("widths", "training_tokens", "seeds")]


def _section(part: Part) -> str:
    lines = [f"### {part.claim}: {part.statement}", f"{part.verdict.capitalize()}. " + " ".join(part.notes)]
    if part.cells:
        names = list(part.cells[0].shown)
        same = [cell for cell in part.cells if list(cell.shown) == names]
        lines.append(_cells_table(names, same))
        if rest := [cell for cell in part.cells if list(cell.shown) != names]:
            lines.append(_cells_table(list(rest[0].shown), rest))
    if part.table is not None:
        lines.append(table(*part.table))
    return "\n\n".join(lines)


def _cells_table(names: list[str], cells: Sequence[Cell]) -> str:
    kind = {"share": "relative difference", "nats": "difference, nats"}.get(cells[0].kind, cells[0].kind)
    rows = [[c.label, *(number(value, 4) for value in c.shown.values()), shown(c), str(c.seeds)] for c in cells]
    return table(["", *names, kind, "seeds"], rows)


def _saes_table(saes: Sequence[Scored]) -> str:
    heads = ["SAE", "F", "asked", "options", "form", "batch", "seed", "L0", "NMSE", "CE increase", "gamma", "dead"]
    figures, rows = (("l0", 2), (NMSE, 4), (CE, 4), ("gamma", 3)), []
    for sae in sorted(saes, key=lambda sae: (sae.variant, sae.width, sae.form, sae.figure("l0").value)):
        k, training = sae.settings["k"], sae.training
        asked = f"k={k:g}" if k is not None else f"sparsity={sae.settings['sparsity']:g}"
        options = ", ".join(f"{name}={value}" for name, value in sae.options.items())
        told = [sae.variant, f"{sae.width:,}", asked, options, sae.form, str(training["batch"]), str(sae.seed)]
        found = [number(sae.figure(name).value, digits) for name, digits in figures]
        rows.append([*told, *found, f"{training['dead'] / sae.width:.1%}"])
    return table(heads, rows)


def draw(bench: Bench, folder: Path, where: str) -> list[str]:
    """Write the figures; their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        variant: bench.pick(variant, width=bench.width)
        for variant in ("topk", "batchtopk", "gated", "jumprelu", "relu")
    }
    rows = [_row(sae) for saes in options.values() for sae in saes if sae.seed == min(s.seed for s in saes)]
    figures: dict[str, Figure] = {}
    for metric, name in METRICS.items() if rows else ():
        figures[f"at-width-{metric}"] = against_l0(rows, metric, name, f"{where}, F={bench.width:,}")
    if bench.pick("topk"):
        figures["widths"] = _by_width(bench, where)
    special = [sae for sae in (*bench.special, *bench.pick("batchtopk", width=bench.width))]
    if special:
        figures["l0-by-token"] = _by_token(special, where)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
    return [f"{name}.png" for name in figures]


def _by_width(bench: Bench, where: str) -> Figure:
    """NMSE and CE increase against width, a line a k, of TopK (dashed) and BatchTopK."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        for number_, k in enumerate(sorted({sae.settings["k"] for sae in bench.pick("topk")})):
            for variant, style in (("topk", "--s"), ("batchtopk", "-^")):
                saes = sorted(bench.pick(variant, k=k), key=lambda sae: sae.width)
                widths = sorted({sae.width for sae in saes})
                values = [np.mean([sae.figure(metric).value for sae in saes if sae.width == width]) for width in widths]
                axes.plot(widths, values, style, color=f"C{number_}", label=f"{variant} k={k}", ms=5)
        axes.set(xscale="log", xlabel="latents F", ylabel=name)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.suptitle(where, fontsize=11)
    return figure


def _by_token(saes: Sequence[Scored], where: str) -> Figure:
    """Histogram of BatchTopK's L0 and its mean by position; where BOS is kept in, its part of the histogram."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number_, sae in enumerate(saes):
        rest, first = (counts_SL.sum(0) for counts_SL in sae.counts)
        total = (rest + first).sum()
        kept = sae.special
        shares, colour = (rest + first) / total, f"C{number_ % 10}"
        left.plot(np.arange(len(shares)), np.where(shares > 0, shares, np.nan), color=colour, label=named(sae), lw=1.2)
        if kept:
            left.plot(np.arange(len(first)), np.where(first > 0, first / total, np.nan), "o", color=colour, ms=4)
        by_position = [np.nan if mean is None else mean for mean in sae.firing["by_position"]]
        right.plot(np.arange(len(by_position)), by_position, color=colour, lw=0.9)
    left.set(yscale="log", xlabel="L0 of a token (dots: tokens at the first position)", ylabel="share of tokens")
    right.set(xlabel="position in the context", ylabel="mean L0", xscale="symlog")
    left.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(where, fontsize=11)
    return figure
