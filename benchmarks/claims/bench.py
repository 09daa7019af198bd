"""What the claims are decided on: the scored SAEs of one site, picked by what they are, compared pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.claims.scores import INFERENCE, Scored
from benchmarks.claims.verdict import (
    UNTESTED,
    Comparison,
    Curve,
    Estimate,
    common,
    comparisons_of,
    count_outcomes,
    curve,
    verdict_of,
)
from data.base.records import Json

NMSE, CE = "nmse", "ce_increase"
METRICS = {NMSE: "NMSE", CE: "CE increase"}
BASELINE = {"form": "bricken", "apply_b_dec_to_input": True}  # of Gated: ReLU with an L1 and unit rows

BEYOND = 1.1  # times a sweep's ends, as far as it is read beyond them

Pairs = Mapping[str, Sequence[tuple[Estimate, Estimate]]]


@dataclass
class Finding:
    """A claim, or one half of it, with its verdict and what that rests on."""

    claim: str
    statement: str
    verdict: str
    comparisons: Sequence[Comparison] = ()
    notes: Sequence[str] = ()
    table: tuple[list[str], list[list[str]]] | None = None
    """Heads and rows to print below the comparisons."""
    saes: Sequence[Scored] = ()

    def extent(self) -> Json:
        """Give the widths, seeds and tokens of what it rests on."""
        return {
            "widths": sorted({sae.width for sae in self.saes}),
            "seeds": sorted({sae.seed for sae in self.saes}),
            "training_tokens": sorted({sae.training["tokens"] for sae in self.saes}),
            "heldout_tokens": sorted({int(sae.tokens) for sae in self.saes}),
        }

    def of_one_seed(self) -> bool:
        """Tell whether some of it rests on one seed, whose spread is then in no interval."""
        if self.verdict == UNTESTED:
            return False
        if self.comparisons:
            return any(one.seeds == 1 for one in self.comparisons)
        return len({sae.seed for sae in self.saes}) == 1

    def shown_verdict(self) -> str:
        """Give the verdict, with a word beside it where it rests on one seed."""
        return f"{self.verdict} (one seed)" if self.of_one_seed() else self.verdict


def decide(
    claim: str, statement: str, comparisons: Sequence[Comparison], saes: Iterable[Scored], *notes: str, **more: Any
) -> Finding:
    """Make the finding that these comparisons decide."""
    outcome = "The SAEs it compares are not all there, or reach no L0 in common."
    if comparisons:
        outcome = f"{count_outcomes(comparisons)}."
    verdict = verdict_of(comparisons)
    return Finding(claim, statement, verdict, comparisons, [outcome, *notes], saes=list(saes), **more)


class Bench:
    """SAEs of one site, `main` without and `special` with the rows of special tokens."""

    def __init__(self, main: Sequence[Scored], special: Sequence[Scored], settings: Mapping[str, Any]) -> None:
        self.main, self.special = main, special
        self.d_in = int(main[0].settings["d_in"])
        self.batch, self.width = settings["batch"], round(settings["expansion"] * self.d_in)

    def pick(
        self, variant: str, *, form: str = INFERENCE, options: Json | None = None, **settings: Any
    ) -> list[Scored]:
        """Pick the SAEs of a variant with just these options; of k, width and batch those given, the usual batch."""
        settings = {"batch": self.batch, **settings}
        if options is None:
            options = BASELINE if variant == "relu" else {}
        return [
            sae
            for sae in self.main
            if (sae.variant, sae.form, sae.options) == (variant, form, options)
            and all((sae.settings | sae.training)[name] == value for name, value in settings.items())
        ]

    def widths(self, variant: str) -> list[int]:
        return sorted({sae.width for sae in self.pick(variant)})

    def ks(self, variant: str, width: int) -> list[int]:
        return sorted({sae.settings["k"] for sae in self.pick(variant, width=width)})

    def k(self) -> int | None:
        """Give the k nearest to d / 24 among those of the TopK SAEs."""
        known = {sae.settings["k"] for sae in self.pick("topk")}
        return min(known, key=lambda k: abs(k - self.d_in / 24), default=None)


def of_k(saes: Iterable[Scored], k: int) -> list[Scored]:
    return [sae for sae in saes if sae.settings["k"] == k]


def of_seeds(saes: Iterable[Scored]) -> dict[int, list[Scored]]:
    """Sort SAEs by seed."""
    by_seed: dict[int, list[Scored]] = {}
    for sae in saes:
        by_seed.setdefault(sae.seed, []).append(sae)
    return by_seed


def line(saes: Sequence[Scored], metric: str) -> Curve | None:
    """Draw a metric against L0 along one seed's sweep, in log-log where it can be: both errors are near powers."""
    figures = [sae.figure(metric) for sae in saes]
    log = metric in METRICS and all(one.value > 0 and float(np.min(one.drawn_M)) > 0 for one in figures)
    return curve([sae.figure("l0") for sae in saes], figures, log=log)


def compared(
    metric: str, pairs: Pairs, *, margin: float = 0.0, names: tuple[str, str] = ("A", "B")
) -> list[Comparison]:
    """Compare A to B at each label: of NMSE their ratio less 1, of another metric the difference."""
    differences, shown = {}, {}
    for label, seeds in pairs.items():
        if not seeds:
            continue
        differences[label] = [a.relative_to(b) if metric == NMSE else a.minus(b) for a, b in seeds]
        shown[label] = {name: float(np.mean([pair[i].value for pair in seeds])) for i, name in enumerate(names)}
    kind = {NMSE: "share", CE: "nats"}.get(metric, metric)
    return comparisons_of(differences, kind=kind, margin=margin, shown=shown)


def at_equal_l0(
    a: Sequence[Scored],
    b: Sequence[Scored],
    metric: str,
    *,
    names: tuple[str, str],
    of: Callable[[Any], Any] = lambda figure: figure,
) -> list[Comparison]:
    """Compare A to B, each read off its own sweep, at L0s that both sweeps reach at every seed they share.

    `of` is what is compared of the metric.
    """
    seeds_a, seeds_b = of_seeds(a), of_seeds(b)
    lines = []
    for seed in sorted(seeds_a.keys() & seeds_b.keys()):
        one, other = line(seeds_a[seed], metric), line(seeds_b[seed], metric)
        if one is not None and other is not None:
            lines.append((one, other))
    l0s = common([one for pair in lines for one in pair]) if lines else []
    pairs = {f"L0 {l0:.1f}": [(x.at(l0).to(of), y.at(l0).to(of)) for x, y in lines] for l0 in l0s}
    return compared(metric, pairs, names=names)


def same(a: Iterable[Scored], b: Iterable[Scored], metric: str) -> list[tuple[Estimate, Estimate]]:
    """Give the figures of A and B at each seed they share."""
    ours, theirs = ({sae.seed: sae for sae in saes} for saes in (a, b))
    return [(ours[seed].figure(metric), theirs[seed].figure(metric)) for seed in sorted(ours.keys() & theirs.keys())]


def at_rivals_l0(ours: Iterable[Scored], rivals: Iterable[Scored], metric: str) -> list[tuple[Estimate, Estimate]]:
    """Give our figure, read off our sweep at the L0 of the rival of its seed, and that rival's, at each shared seed."""
    lines = {seed: line(saes, metric) for seed, saes in of_seeds(ours).items()}
    pairs = []
    for rival in sorted(rivals, key=lambda sae: sae.seed):
        sweep = lines.get(rival.seed)
        if sweep is None:
            continue
        low, high = sweep.reach()
        if low / BEYOND <= rival.figure("l0").value <= high * BEYOND:
            pairs.append((sweep.at(rival.figure("l0")), rival.figure(metric)))
    return pairs
