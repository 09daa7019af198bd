"""The claims' report: `claims.md` for reading, `claims.json` with every comparison, `plots/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.claims.bench import CE, METRICS, NMSE, Bench, Finding
from benchmarks.claims.scores import Scored
from benchmarks.claims.topk import named, shown
from benchmarks.claims.verdict import Comparison
from data.base.files import write_atomic
from data.base.records import Json
from evaluate.report.columns import FEW_DOCUMENTS
from evaluate.report.markdown import dumps, format_number, table
from evaluate.report.png import plot_against_l0

FORMAT = 2
SWEEPS = ("topk", "batchtopk", "gated", "jumprelu", "relu")
RULES = (
    "Every interval is of 95%, by paired bootstrap over documents; where a claim has several seeds, their spread is"
    " added in quadrature, and where it has one, that spread is not in it, which its verdict says. A claim holds where"
    " every comparison's interval lies on its side. It does not hold where one lies on the other side, widened for the"
    " number of comparisons (Bonferroni): a claim exactly at its boundary fails in at most 5%. Else it is undecided."
    " Differences of NMSE are relative, of CE increase in nats. Where two variants meet at an L0 that one of them was"
    " not trained at, it is read off the curve through its sweep in log-log; the interval is wider by the distance to"
    " the curve without the farthest SAE (of it reading)."
)


def write(bench: Bench, findings: Sequence[Finding], place: Json, out: Path) -> Path:
    """Write the report into `out` and give the path of `claims.md`, which is written last."""
    plots = draw(
        bench, out / "plots", f"{place['model']}, {place['site']}, {place['heldout_tokens']:,} held-out tokens"
    )
    saes = [_row(sae) for sae in (*bench.main, *bench.special)]
    record = {"format": FORMAT, "place": place, "findings": [_record(one) for one in findings], "saes": saes}
    write_atomic(out / "claims.json", dumps(record))
    write_atomic(out / "claims.md", markdown(findings, place, plots, [*bench.main, *bench.special]))
    return out / "claims.md"


def _record(finding: Finding) -> Json:
    """Give a finding as claims.json has it."""
    comparisons = [asdict(one) | {"low": one.low, "high": one.high} for one in finding.comparisons]
    words = {"claim": finding.claim, "statement": finding.statement, "verdict": finding.verdict}
    more = {"notes": finding.notes, "table": finding.table, "extent": finding.extent()}
    return words | {"one_seed": finding.of_one_seed(), "comparisons": comparisons} | more


def _row(sae: Scored) -> Json:
    """Give an SAE as evaluate's own report has it, for its figures too; None for a figure that is not finite."""
    metrics = {}
    for name in ("l0", "ev", "gamma", "recovered_zero", *METRICS):
        one = sae.figure(name)
        pair = one.value, float(np.std(one.drawn_M))
        metrics[name] = {what: x if np.isfinite(x) else None for what, x in zip(("value", "se"), pair, strict=True)}
    identity = {
        "variant": sae.variant,
        "form": sae.form,
        "width": sae.width,
        "seed": sae.seed,
        "settings": sae.settings,
    }
    training = {name: sae.training[name] for name in ("tokens", "batch", "dead", "dead_after")}
    return {
        **identity,
        "folder": str(sae.folder),
        "training": training,
        "metrics": metrics,
        "l0": sae.firing,
        "pareto": [],
    }


def markdown(findings: Sequence[Finding], place: Json, plots: Sequence[str], saes: Sequence[Scored]) -> str:
    """Write the whole report."""
    head = (
        f"# The papers' claims on {place['model']}, {place['site']}\n\n"
        f"Width {place['d_model']:,}; {len({sae.folder for sae in saes})} SAEs, in their inference form where no"
        f" other is named ({len(saes)} in all), scored on"
        f" the same {place['heldout_tokens']:,} held-out tokens ({place['contexts']:,} contexts of {place['context']},"
        f" of {place['documents']:,} documents).\n\n{RULES}"
    )
    if place["documents"] < FEW_DOCUMENTS:
        head += f" With {place['documents']} documents, fewer than {FEW_DOCUMENTS}, an interval may be too narrow."
    rows = [
        [f"{one.claim}: {one.statement}", f"**{one.shown_verdict()}**", one.notes[0], *_extent(one)] for one in findings
    ]
    summary = table(["claim", "verdict", "comparisons", "widths", "training tokens", "seeds"], rows)
    figures = "\n\n".join(f"![{Path(name).stem}](plots/{name})" for name in plots)
    detail = "\n\n".join(_section(one) for one in findings if one.comparisons or one.table)
    return "\n\n".join([head, summary, figures, "## Comparisons", detail, "## SAEs", _saes_table(saes)]) + "\n"


def _extent(finding: Finding) -> list[str]:
    extent = finding.extent()
    return [", ".join(f"{value:,}" for value in extent[name]) for name in ("widths", "training_tokens", "seeds")]


def _section(finding: Finding) -> str:
    verdict = finding.shown_verdict()
    lines = [f"### {finding.claim}: {finding.statement}", f"{verdict.capitalize()}. " + " ".join(finding.notes)]
    by_names: dict[tuple[str, ...], list[Comparison]] = {}  # a table for each set of figures that is shown
    for one in finding.comparisons:
        by_names.setdefault(tuple(one.shown), []).append(one)
    lines += [_comparisons_table(names, comparisons) for names, comparisons in by_names.items()]
    if finding.table is not None:
        lines.append(table(*finding.table))
    return "\n\n".join(lines)


def _comparisons_table(names: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    kind = comparisons[0].kind
    heading = {"share": "relative difference", "nats": "difference, nats"}.get(kind, kind)
    rows = []
    for one in comparisons:
        figures = [format_number(value, 4) for value in one.shown.values()]
        reading = format_number(one.reading_error, 4) if one.reading_error else ""
        rows.append([one.label, *figures, shown(one), reading, str(one.seeds)])
    return table(["", *names, heading, "of it reading", "seeds"], rows)


def _saes_table(saes: Sequence[Scored]) -> str:
    heads = ["SAE", "F", "target", "options", "form", "batch", "seed", "L0", "NMSE", "CE increase", "gamma", "dead"]
    figures = (("l0", 2), (NMSE, 4), (CE, 4), ("gamma", 3))
    rows = []
    for sae in sorted(saes, key=lambda sae: (sae.variant, sae.width, sae.form, sae.figure("l0").value)):
        training = sae.training
        options = ", ".join(f"{name}={value}" for name, value in sae.options.items())
        words = [sae.variant, f"{sae.width:,}", sae.target(), options, sae.form, str(training["batch"]), str(sae.seed)]
        values = [format_number(sae.figure(name).value, digits) for name, digits in figures]
        rows.append([*words, *values, f"{training['dead'] / sae.width:.1%}"])
    return table(heads, rows)


def draw(bench: Bench, folder: Path, where: str) -> list[str]:
    """Write the figures and give their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for variant in SWEEPS:
        saes = bench.pick(variant, width=bench.width)
        rows += [_row(sae) for sae in saes if sae.seed == min(one.seed for one in saes)]
    figures: dict[str, Figure] = {}
    for metric, name in METRICS.items() if rows else ():
        figures[f"at-width-{metric}"] = plot_against_l0(rows, metric, name, f"{where}, F={bench.width:,}")
    if bench.pick("topk"):
        figures["widths"] = _by_width(bench, where)
    special = [sae for sae in (*bench.special, *bench.pick("batchtopk", width=bench.width))]
    if special:
        figures["l0-by-token"] = _by_token(special, where)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
    return [f"{name}.png" for name in figures]


def _by_width(bench: Bench, where: str) -> Figure:
    """Return NMSE and CE increase against width, a line a k, of TopK (dashed) and BatchTopK."""
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
    """Return the histogram of BatchTopK's L0 and its mean by position;
    where BOS is stored, its part of the histogram."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number_, sae in enumerate(saes):
        rest, first = (counts_GL.sum(0) for counts_GL in sae.counts)
        total = (rest + first).sum()
        shares, colour = (rest + first) / total, f"C{number_ % 10}"
        left.plot(np.arange(len(shares)), np.where(shares > 0, shares, np.nan), color=colour, label=named(sae), lw=1.2)
        if sae.special:
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
