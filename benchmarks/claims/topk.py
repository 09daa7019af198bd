"""Bussmann et al.'s claims for BatchTopK (2412.06410 and the post before it): S1 to S5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.claims.bench import CE, METRICS, NMSE, Bench, Finding, at_rivals_l0, compared, decide, of_k, same
from benchmarks.claims.scores import BATCH, INFERENCE, PER_TOKEN, THRESHOLD, Scored
from benchmarks.claims.verdict import FAILS, UNTESTED, Comparison, Estimate, comparisons_of
from evaluate.metrics import Columns, resampled, totals
from evaluate.report.markdown import format_number

MARGINS = {NMSE: 0.01, CE: 0.002}  # S4: what "at least as good" forgives, of NMSE 1%, of CE in nats
VARIES = 0.25  # S3: the standard deviation of L0 over its mean from which on it "varies by token"
NEAR = 0.25  # S3: of 1 / context, within which the low peak's share is equal to it

NAMES = ("BatchTopK", "TopK")


def claims(bench: Bench) -> list[Finding]:
    k = bench.k()
    if k is None:
        return [decide("S1", "BatchTopK beats TopK", [], [])]
    places = {(width, k) for width in bench.widths("topk")}
    findings = [*_better(bench, "S1", f"at every width, k={k}", places)]
    places = {(bench.width, k) for k in bench.ks("topk", bench.width)}
    findings += _better(bench, "S2", f"at width {bench.width:,}, every k", places)
    return findings + l0_varies(bench) + _inference(bench) + _swapped(bench)


def _better(bench: Bench, claim: str, where: str, places: set[tuple[int, int]]) -> list[Finding]:
    """Compare BatchTopK with TopK at TopK's measured L0, BatchTopK read off its sweep over k at the same width."""
    findings = []
    for metric, name in METRICS.items():
        pairs = {}
        plain = {}
        used: list[Scored] = []
        for width, k in sorted(places):
            ours = bench.pick("batchtopk", width=width)
            theirs = bench.pick("topk", width=width, k=k)
            pairs[f"F={width:,} k={k}"] = at_rivals_l0(ours, theirs, metric)
            plain[f"F={width:,} k={k}"] = same(of_k(ours, k), theirs, metric)
            used += [*ours, *theirs]
        comparisons = compared(metric, pairs, names=NAMES)
        table = ["at equal k, whatever the L0", *NAMES, "difference"], _plain_rows(compared(metric, plain, names=NAMES))
        statement = f"BatchTopK beats TopK in {name} {where}, at equal L0"
        findings.append(decide(claim, statement, comparisons, used, table=table if comparisons else None))
    return findings


def _plain_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    return [[one.label, *(format_number(value, 4) for value in one.shown.values()), shown(one)] for one in comparisons]


def shown(comparison: Comparison) -> str:
    """Write a difference with its interval."""
    digits = "+.1%" if comparison.kind == "share" else "+.4f"
    return f"{comparison.value:{digits}} [{comparison.low:{digits}}, {comparison.high:{digits}}]"


def l0_varies(bench: Bench) -> list[Finding]:
    saes = [*bench.pick("batchtopk", width=bench.width), *(s for s in bench.special if s.variant == "batchtopk")]
    varying = comparisons_of({named(sae): [_unlike(sae)] for sae in saes}, kind="sd of L0 / mean L0, below", margin=0.0)
    flat = [replace(one, shown={"sd / mean": VARIES - one.value}) for one in varying]
    statement = f"BatchTopK's L0 varies by token (its standard deviation is over {VARIES:.0%} of its mean)"
    return [decide("S3", statement, flat, saes), _low_peak([s for s in bench.special if s.variant == "batchtopk"])]


def named(sae: Scored) -> str:
    """Name an SAE in tables and plots."""
    words = [f"F={sae.width:,} k={sae.settings['k']} seed {sae.seed}"]
    words += [f"{name}={value}" for name, value in sae.options.items()]
    if sae.special:
        words.append("BOS in")
    return " ".join(words)


def _drawn(sae: Scored, **columns: NDArray[np.float64]) -> tuple[Columns, Columns]:
    """Sum columns over the documents: of all of them, and of the bootstrap's draws."""
    samples = len(sae.figure("l0").drawn_M)
    return totals(columns), resampled(columns, samples=samples, seed=0)


def _unlike(sae: Scored) -> Estimate:
    """Give VARIES less the standard deviation of L0 over its mean."""
    counts_GL = sae.counts.sum(0).astype(float)
    l0 = np.arange(counts_GL.shape[1])
    both = []
    for sums in _drawn(sae, n=counts_GL.sum(1), first=counts_GL @ l0, second=counts_GL @ l0**2):
        with np.errstate(invalid="ignore"):  # a draw without tokens
            mean, square = sums["first"] / sums["n"], sums["second"] / sums["n"]
        sd = np.sqrt(np.maximum(square - mean**2, 0))
        both.append(VARIES - np.divide(sd, mean, out=np.zeros_like(sd), where=mean > 0))  # one that never fires: 0
    return Estimate(float(both[0][0]), both[1])


def low_peak(histogram: NDArray[np.float64]) -> int | None:
    """Find the L0 at which a low peak ends: the emptiest place between it and the main one; None where there is none.

    The main peak is the most frequent L0. A peak below it must stand at least twice as high as the emptiest place
    between the two, which is the last of the low peak.
    """
    main = int(histogram.argmax())
    best: tuple[float, int] | None = None
    for low in range(main - 1):
        valley = low + 1 + int(histogram[low + 1 : main].argmin())
        height = float(histogram[low])
        if height > 0 and height >= 2 * histogram[valley] and (best is None or height > best[0]):
            best = height, valley
    return None if best is None else best[1] - (0 if histogram[best[1]] else 1)


def _low_peak(saes: Sequence[Scored]) -> Finding:
    statement = f"with BOS kept in, L0 has a low peak of 1/context of the tokens (within {NEAR:.0%})"
    if not saes:
        return Finding("S3", statement, UNTESTED, notes=["No SAE was trained with the rows of special tokens."])
    shares: dict[str, list[Estimate]] = {}
    rows: list[list[str]] = []
    without_peak = 0
    for sae in saes:
        counts_PGL = sae.counts.astype(float)
        histogram = counts_PGL.sum((0, 1))
        context = len(sae.firing["by_position"])
        cut = low_peak(histogram)
        first = counts_PGL[1].sum(0)
        bos = f"{float(first @ np.arange(len(first)) / first.sum()):.1f}"
        row = [named(sae), f"{sae.figure('l0').value:.1f}", bos, str(int(histogram.argmax()))]
        if cut is None:
            rows.append([*row, "none", "–", "–"])
            without_peak += 1
            continue
        low_G = counts_PGL[:, :, : cut + 1].sum((0, 2))
        both = _drawn(sae, low=low_G, n=counts_PGL.sum((0, 2)))
        value, drawn = (np.abs(sums["low"] / sums["n"] * context - 1) for sums in both)
        shares[named(sae)] = [Estimate(float(value[0]), drawn)]
        share, inside = low_G.sum() / histogram.sum(), first[: cut + 1].sum() / low_G.sum()
        if inside < 0.5:
            without_peak += 1  # a low peak, of other tokens than BOS
        rows.append([*row, f"L0 <= {cut}", f"{share:.2%} (1/context {1 / context:.2%})", f"{inside:.0%}"])
    finding = decide("S3", statement, comparisons_of(shares, kind="share", margin=NEAR), saes)
    heads = ["SAE", "L0", "mean L0 at BOS", "most frequent L0", "low peak", "its share", "of it BOS"]
    verdict = FAILS if without_peak else finding.verdict
    notes = [f"{without_peak} of {len(saes)} SAEs have no low peak of BOS."] if without_peak else []
    notes += finding.notes
    if not shares:
        notes = ["There is no low peak: L0 falls to no second mode below the main one."]
    return replace(finding, verdict=verdict, table=(heads, rows), notes=notes)


def _inference(bench: Bench) -> list[Finding]:
    """Compare the threshold, read off its sweep at the batch form's L0, with the top k of one batch of contexts."""
    inference, batch = (bench.pick("batchtopk", width=bench.width, form=form) for form in (INFERENCE, BATCH))
    ks = sorted({sae.settings["k"] for sae in batch})
    findings = []
    for metric, name in METRICS.items():
        pairs = {f"k={k}": at_rivals_l0(inference, of_k(batch, k), metric) for k in ks}
        plain = {f"k={k}": same(of_k(inference, k), of_k(batch, k), metric) for k in ks}
        names = ("threshold", "batch form")
        comparisons = compared(metric, pairs, margin=MARGINS[metric], names=names)
        forgiven = "1%" if metric == NMSE else f"{MARGINS[CE]:g} nats"
        statement = (
            f"the fixed threshold is at least as good in {name} as the batch form at inference (within {forgiven})"
        )
        rows = _plain_rows(compared(metric, plain, names=names))
        for k, row in zip(ks, rows, strict=True):
            row.append(", ".join(str(round(sae.figure("l0").value, 2)) for sae in of_k(inference, k)))
        heads = ["as they are", *names, "difference", "L0 threshold"]
        table = (heads, rows) if comparisons else None
        findings.append(decide("S4", f"{statement}, at equal L0", comparisons, batch, table=table))
    return findings


def _swapped(bench: Bench) -> list[Finding]:
    """Compare each SAE's own form with the other's, with the same weights and for the same k."""
    findings = []
    for variant, called, form in (("topk", "TopK", THRESHOLD), ("batchtopk", "BatchTopK", PER_TOKEN)):
        own, other = (bench.pick(variant, width=bench.width, form=one) for one in (INFERENCE, form))
        ks = sorted({sae.settings["k"] for sae in other})
        for metric, name in METRICS.items():
            pairs = {f"k={k}": same(of_k(own, k), of_k(other, k), metric) for k in ks}
            comparisons = compared(metric, pairs, names=("own form", "swapped"))
            into = "a calibrated threshold" if form == THRESHOLD else "the top k of each token"
            statement = f"{called} under the other's activation function ({into}) loses in {name}"
            findings.append(decide("S5", statement, comparisons, other))
    return findings
