"""S6: BatchTopK against JumpReLU and Gated. S7: Rajamanoharan et al.'s claims for Gated (2404.16014)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.claims.bench import METRICS, Bench, Finding, at_equal_l0, decide
from benchmarks.claims.scores import RESCALED, Scored
from benchmarks.claims.verdict import Estimate, comparisons_of
from train.sae.base import SAE
from train.sae.io import load

GAMMA = "gamma"
MOST = 1.5  # S7: compute of a step over the baseline's
_STEPS, _SAMPLES = 31, 1000


def claims(bench: Bench, rows: Callable[[Scored], Tensor]) -> list[Finding]:
    """Decide S6 and S7; `rows` gives a batch that an SAE could be trained on, in model units."""
    findings = []
    ours = bench.pick("batchtopk", width=bench.width)
    for variant, called in (("jumprelu", "JumpReLU"), ("gated", "Gated")):
        rivals = bench.pick(variant, width=bench.width)
        for metric, name in METRICS.items():
            comparisons = at_equal_l0(ours, rivals, metric, names=("BatchTopK", called))
            statement = f"BatchTopK beats {called} in {name} at equal L0"
            findings.append(decide("S6", statement, comparisons, [*ours, *rivals]))
    return findings + _gated(bench, rows)


def _gated(bench: Bench, rows: Callable[[Scored], Tensor]) -> list[Finding]:
    gated, baseline = (bench.pick(variant, width=bench.width) for variant in ("gated", "relu"))
    rescaled = bench.pick("relu", width=bench.width, form=RESCALED)
    findings = []
    for metric, name in METRICS.items():
        comparisons = at_equal_l0(gated, baseline, metric, names=("Gated", "L1"))
        statement = f"Gated improves on the L1 baseline in {name} at equal L0"
        findings.append(decide("S7", statement, comparisons, [*gated, *baseline]))
    findings += [shrinkage(gated, baseline), _compute(gated, baseline, rows)]
    for metric, name in METRICS.items():
        comparisons = at_equal_l0(gated, rescaled, metric, names=("Gated", "L1 rescaled"))
        statement = f"a scale and a shift for each latent, fitted after training, do not close the gap in {name}"
        findings.append(decide("S7", statement, comparisons, [*gated, *rescaled]))
    return findings


def shrinkage(gated: Sequence[Scored], baseline: Sequence[Scored]) -> Finding:
    """Compare gamma of the baseline with 1, and its distance from 1 with Gated's."""
    statement = "the L1 baseline shrinks (gamma below 1), Gated's gamma is nearer to 1"
    below_one: dict[str, list[Estimate]] = {}
    for sae in baseline:
        label = f"gamma - 1 of L1, {sae.target()}"
        below_one.setdefault(label, []).append(sae.figure(GAMMA).to(lambda g: g - 1))
    mean = {label: 1 + float(np.mean([seed.value for seed in seeds])) for label, seeds in below_one.items()}
    low = comparisons_of(below_one, kind=GAMMA, shown={label: {"L1": gamma} for label, gamma in mean.items()})
    names = ("distance of gamma from 1, Gated", "L1")
    nearer = at_equal_l0(gated, baseline, GAMMA, names=names, of=lambda g: abs(g - 1))
    return decide("S7", statement, [*low, *nearer] if low and nearer else [], [*gated, *baseline])


def _compute(gated: Sequence[Scored], baseline: Sequence[Scored], rows: Callable[[Scored], Tensor]) -> Finding:
    """Time loss and backward of the two, nearest in L0 of all pairs, in turn on one batch."""
    statement = f"a training step of Gated costs at most {MOST} times the baseline's"
    fires = [[sae for sae in saes if sae.figure("l0").value > 0] for saes in (gated, baseline)]
    pairs = [(one, two) for one in fires[0] for two in fires[1] if one.seed == two.seed]
    if not pairs:
        return decide("S7", statement, [], [])

    def apart(pair: tuple[Scored, Scored]) -> float:
        first, second = (sae.figure("l0").value for sae in pair)
        return abs(float(np.log(first / second)))

    one, two = min(pairs, key=apart)
    ratios = step_ratios(load(one.folder), load(two.folder), rows(one))
    rng = np.random.default_rng(0)
    drawn_M = np.median(rng.choice(ratios, (_SAMPLES, len(ratios))), axis=1)
    label = f"L0 {one.figure('l0').value:.1f} and {two.figure('l0').value:.1f}, {torch.get_num_threads()} threads"
    comparisons = comparisons_of(
        {label: [Estimate(float(np.median(ratios)) - MOST, drawn_M - MOST)]},
        kind=f"times the baseline's time, less {MOST}",
        shown={label: {"Gated / L1": float(np.median(ratios))}},
    )
    note = "Counted in dense products the ratio is 8/6: an encoder both ways, and a second decoder that is not trained."
    return decide(
        "S7", statement, comparisons, [one, two], f"Median of {len(ratios)} pairs of steps on this machine. {note}"
    )


def step_ratios(one: SAE, two: SAE, x_BD: Tensor) -> NDArray[np.float64]:
    """Give the seconds of `one`'s loss and backward over those of `two`, pair by pair; the first pair warms up."""
    seconds = np.empty((_STEPS + 1, 2))
    for i in range(_STEPS + 1):
        for j, sae in enumerate((one, two)):
            began = time.perf_counter()
            sae.loss(sae.norm.normalise(x_BD)).loss.backward()  # type: ignore[no-untyped-call]
            seconds[i, j] = time.perf_counter() - began
            sae.zero_grad()
    ratios: NDArray[np.float64] = seconds[1:, 0] / seconds[1:, 1]
    return ratios
