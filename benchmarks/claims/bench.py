"""What the claims are judged on: the scored SAEs of one site, picked by what they are, compared pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.claims.scores import SHIPPED, Scored
from benchmarks.claims.verdict import Cell, Curve, Estimate, cells, common, counted, curve, judged
from data.base.records import Json

NMSE, CE = "nmse", "ce_increase"
METRICS = {NMSE: "NMSE", CE: "CE increase"}
BASELINE = {"form": "bricken", "apply_b_dec_to_input": True}  # of Gated: ReLU with an L1 and unit rows

BEYOND = 1.1  # times a sweep's ends, as far as it is read beyond them

Pairs = Mapping[str, Sequence[tuple[Estimate, Estimate]]]


@dataclass
class Part:
    """A claim, or one half of it, and what was found.

    table: heads and rows to print below the comparisons. saes: those it rests on.
    """

    claim: str
    statement: str
    verdict: str
    cells: Sequence[Cell] = ()
    notes: Sequence[str] = ()
    table: tuple[list[str], list[list[str]]] | None = None
    saes: Sequence[Scored] = ()

    def extent(self) -> Json:
        """Widths, seeds and training tokens of what it rests on."""
        return {
            "widths": sorted({sae.width for sae in self.saes}),
            "seeds": sorted({sae.seed for sae in self.saes}),
            "training_tokens": sorted({sae.training["tokens"] for sae in self.saes}),
            "heldout_tokens": sorted({int(sae.tokens) for sae in self.saes}),
        }


def tested(claim: str, statement: str, found: Sequence[Cell], saes: Iterable[Scored], *notes: str, **more: Any) -> Part:
    """The part that these comparisons decide."""
    told = [f"{counted(found)}."] if found else ["The SAEs it compares are not all there, or reach no L0 in common."]
    return Part(claim, statement, judged(found), found, [*told, *notes], saes=list(saes), **more)


class Bench:
    """SAEs of one site, `main` without and `special` with the rows of special tokens."""

    def __init__(self, main: Sequence[Scored], special: Sequence[Scored], settings: Mapping[str, Any]) -> None:
        self.main, self.special = main, special
        self.d_in = int(main[0].settings["d_in"])
        self.batch, self.width = settings["batch"], settings["expansion"] * self.d_in

    def pick(self, variant: str, *, form: str = SHIPPED, options: Json | None = None, **asked: Any) -> list[Scored]:
        """SAEs of a variant with just these options; `asked` are k, width, batch (the settings' own unless given)."""
        asked = {"batch": self.batch, **asked}
        options = (BASELINE if variant == "relu" else {}) if options is None else options
        return [
            sae
            for sae in self.main
            if (sae.variant, sae.form, sae.options) == (variant, form, options)
            and all((sae.settings | sae.training)[name] == value for name, value in asked.items())
        ]

    def widths(self, variant: str) -> list[int]:
        return sorted({sae.width for sae in self.pick(variant)})

    def ks(self, variant: str, width: int) -> list[int]:
        return sorted({sae.settings["k"] for sae in self.pick(variant, width=width)})

    def k(self) -> int | None:
        """The k nearest to d / 24 among those of the TopK SAEs."""
        known = {sae.settings["k"] for sae in self.pick("topk")}
        return min(known, key=lambda k: abs(k - self.d_in / 24), default=None)


def of_seeds(saes: Iterable[Scored]) -> dict[int, list[Scored]]:
    """SAEs by seed."""
    found: dict[int, list[Scored]] = {}
    for sae in saes:
        found.setdefault(sae.seed, []).append(sae)
    return found


def line(saes: Sequence[Scored], metric: str) -> Curve | None:
    """A metric against L0 along one seed's sweep, straight in log-log where it can be: both errors are near powers."""
    figures = [sae.figure(metric) for sae in saes]
    log = metric in METRICS and all(one.value > 0 and float(np.min(one.drawn_M)) > 0 for one in figures)
    return curve([sae.figure("l0") for sae in saes], figures, log=log)


def compared(metric: str, pairs: Pairs, *, margin: float = 0.0, names: tuple[str, str] = ("A", "B")) -> list[Cell]:
    """A less B at each place: of NMSE their ratio less 1, of another metric the difference."""
    differ = {
        label: [a.over(b) if metric == NMSE else a.less(b) for a, b in seeds] for label, seeds in pairs.items() if seeds
    }
    shown = {
        label: {name: float(np.mean([pair[i].value for pair in seeds])) for i, name in enumerate(names)}
        for label, seeds in pairs.items()
        if seeds
    }
    kind = "share" if metric == NMSE else "nats" if metric == CE else metric
    return cells(differ, kind=kind, margin=margin, shown=shown)


def at_equal_l0(
    a: Sequence[Scored],
    b: Sequence[Scored],
    metric: str,
    *,
    names: tuple[str, str],
    of: Callable[[Any], Any] = lambda figure: figure,
) -> list[Cell]:
    """A against B, each read off its own sweep, at L0s that both sweeps reach at every seed they share.

    `of` is what is compared of the metric.
    """
    by_seed = [of_seeds(a), of_seeds(b)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    lines = [(line(by_seed[0][seed], metric), line(by_seed[1][seed], metric)) for seed in seeds]
    found = [(x, y) for x, y in lines if x is not None and y is not None]
    places = common([one for pair in found for one in pair]) if found else []
    pairs = {f"L0 {l0:.1f}": [(x.at(l0).to(of), y.at(l0).to(of)) for x, y in found] for l0 in places}
    return compared(metric, pairs, names=names)


def same(a: Iterable[Scored], b: Iterable[Scored], metric: str) -> list[tuple[Estimate, Estimate]]:
    """The figures of A and B at each seed they share."""
    ours, theirs = ({sae.seed: sae for sae in saes} for saes in (a, b))
    return [(ours[seed].figure(metric), theirs[seed].figure(metric)) for seed in sorted(ours.keys() & theirs.keys())]


def at_rivals_l0(ours: Iterable[Scored], rivals: Iterable[Scored], metric: str) -> list[tuple[Estimate, Estimate]]:
    """Ours, read off its sweep at the L0 of the rival of its seed, and that rival's, at each seed they share."""
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
