"""S8: Gao et al.'s claims (2406.04093): the law over width and k, dead latents, TopK against ReLU. And batch size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from benchmarks.claims import law
from benchmarks.claims.bench import METRICS, NMSE, Bench, Finding, at_equal_l0, compared, decide, same
from benchmarks.claims.scores import Scored
from benchmarks.claims.verdict import FAILS, HOLDS, UNDECIDED, UNTESTED, Estimate, comparisons_of
from evaluate.report.markdown import format_number

FITS, MISSES = 0.02, 0.05  # root mean square error of a point left out: the law holds up to the first
LEAST = 8  # points that the law's six coefficients are fitted to

_AUXK, _UNTIED = {"auxk_alpha": 0}, {"tied_init": False}


def claims(bench: Bench) -> list[Finding]:
    findings = [_law(bench), *_monotone(bench), *_dead(bench)]
    ours, baseline = (bench.pick(variant, width=bench.width) for variant in ("topk", "relu"))
    for metric, name in METRICS.items():
        comparisons = at_equal_l0(ours, baseline, metric, names=("TopK", "ReLU"))
        findings.append(
            decide("S8", f"TopK beats ReLU with an L1 in {name} at equal L0", comparisons, [*ours, *baseline])
        )
    return [*findings, *_batch(bench)]


def _grid(bench: Bench) -> dict[tuple[int, int], list[Scored]]:
    """Sort TopK SAEs by (width, k)."""
    by_place: dict[tuple[int, int], list[Scored]] = {}
    for sae in sorted(bench.pick("topk"), key=lambda sae: (sae.width, sae.settings["k"])):
        by_place.setdefault((sae.width, sae.settings["k"]), []).append(sae)
    return by_place


def _law(bench: Bench) -> Finding:
    grid = _grid(bench)
    statement = f"the law L(n, k) describes TopK's NMSE (a point left out is met within {FITS:.0%}, root mean square)"
    if len(grid) < LEAST:
        note = f"The law has six coefficients; it takes {LEAST} SAEs or more of different width and k."
        return Finding("S8", statement, UNTESTED, notes=[note])
    n, k = np.array(list(grid), float).T
    y = np.array([np.mean([sae.figure(NMSE).value for sae in saes]) for saes in grid.values()])
    rows = []
    errors = {}
    laws = {floor: law.fit(n, k, y, floor=floor) for floor in (False, True)}
    for floor, one in laws.items():
        inside = law.residuals(one, n, k, y)
        outside = law.left_out(n, k, y, floor=floor)
        errors[floor] = float(np.sqrt(np.mean(outside**2)))
        coefficients = ", ".join(f"{name} {c:.3g}" for name, c in zip(law.NAMES, one.coefficients, strict=False))
        rms = np.sqrt(np.mean(inside**2))
        named = f"{'six' if floor else 'first four'} coefficients: {coefficients}"
        rows.append([named, f"{rms:.2%}", f"{np.abs(inside).max():.2%}", f"{errors[floor]:.2%}"])
    best = min(errors.values())
    verdict = UNDECIDED
    if best <= FITS:
        verdict = HOLDS
    elif best > MISSES:
        verdict = FAILS
    heads = ["law", "rms residual", "largest", "rms of a point left out"]
    each = [
        f"F={width:,.0f} k={of:g} {log:+.1%}"
        for width, of, log in zip(n, k, law.residuals(laws[True], n, k, y), strict=True)
    ]
    notes = ["Residuals, log(NMSE / L) with six coefficients: " + ", ".join(each) + "."]
    saes = [sae for saes in grid.values() for sae in saes]
    least = f"A point left out is met within {best:.1%}."
    return Finding("S8", statement, verdict, notes=[least, *notes], table=(heads, rows), saes=saes)


def _monotone(bench: Bench) -> list[Finding]:
    """Compare each doubling of the width, and each next k, with the one before."""
    grid = _grid(bench)
    findings = []
    widths = sorted({width for width, _ in grid})
    ks = sorted({k for _, k in grid})
    steps = {
        "a wider TopK has a lower NMSE at every k": [((b, k), (a, k)) for k in ks for a, b in pairwise(widths)],
        "a TopK of larger k has a lower NMSE at every width": [
            ((n, b), (n, a)) for n in widths for a, b in pairwise(ks)
        ],
    }
    for statement, pairs in steps.items():
        both = [pair for pair in pairs if grid.keys() >= set(pair)]
        made = {f"F={a[0]:,} k={a[1]} : F={b[0]:,} k={b[1]}": same(grid[a], grid[b], NMSE) for a, b in both}
        used = [sae for pair in both for place in pair for sae in grid[place]]
        findings.append(decide("S8", statement, compared(NMSE, made, names=("one", "other")), used))
    return findings


def _share(sae: Scored) -> Estimate:
    """Give the share of latents that were dead at the end of training; the bootstrap is over latents."""
    rng = np.random.default_rng([sae.seed, *str(sae.folder).encode()])  # SAEs die independently of one another
    share = sae.training["dead"] / sae.width
    return Estimate(share, rng.binomial(sae.width, share, len(sae.figure(NMSE).drawn_M)) / sae.width)


def _dead(bench: Bench) -> list[Finding]:
    """Compare within a design of two by two: AuxK on or off, encoder tied to the decoder at the start or not."""
    off = bench.pick("topk", options=_AUXK)
    width = max((sae.width for sae in off), default=bench.width)
    design = {
        "tied, AuxK": bench.pick("topk", width=width),
        "tied, no AuxK": bench.pick("topk", width=width, options=_AUXK),
        "untied, AuxK": bench.pick("topk", width=width, options=_UNTIED),
        "untied, no AuxK": bench.pick("topk", width=width, options=_AUXK | _UNTIED),
    }
    ks = {sae.settings["k"] for sae in off}
    design = {name: [sae for sae in saes if sae.settings["k"] in ks] for name, saes in design.items()}
    rows = [
        [
            name,
            f"{sae.settings['k']}",
            f"{sae.seed}",
            f"{_share(sae).value:.1%}",
            format_number(sae.figure(NMSE).value, 4),
        ]
        for name, saes in design.items()
        for sae in saes
    ]
    heads = [f"F={width:,}", "k", "seed", "dead", "NMSE"]
    everyone = [sae for saes in design.values() for sae in saes]
    window = {sae.training["dead_after"] for sae in everyone}
    note = f"Dead: silent for the last {', '.join(f'{w:,}' for w in sorted(window))} training tokens."
    findings = []
    for statement, pairs in {
        "AuxK leaves fewer latents dead": [("tied, AuxK", "tied, no AuxK"), ("untied, AuxK", "untied, no AuxK")],
        "an encoder that starts as the decoder's transpose leaves fewer latents dead": [
            ("tied, AuxK", "untied, AuxK"),
            ("tied, no AuxK", "untied, no AuxK"),
        ],
    }.items():
        differences: dict[str, list[Estimate]] = {}
        for a, b in pairs:
            ours, theirs = ({sae.seed: sae for sae in design[name]} for name in (a, b))
            if seeds := sorted(ours.keys() & theirs.keys()):
                differences[f"{a} : {b}"] = [_share(ours[seed]).minus(_share(theirs[seed])) for seed in seeds]
        comparisons = comparisons_of(differences, kind="share of latents")
        findings.append(decide("S8", statement, comparisons, everyone, note, table=(heads, rows)))
    return findings


def _batch(bench: Bench) -> list[Finding]:
    """Answer the post's question: BatchTopK against TopK at each batch size, at equal k, tokens and learning rate."""
    pairs = {}
    used: list[Scored] = []
    sizes = sorted({sae.training["batch"] for sae in bench.main})
    for size in sizes if len(sizes) > 1 else []:
        ours, theirs = (bench.pick(v, width=bench.width, batch=size, k=bench.k()) for v in ("batchtopk", "topk"))
        pairs[f"B={size:,}"] = same(ours, theirs, NMSE)
        used += [*ours, *theirs]
    statement = "BatchTopK beats TopK in NMSE at every batch size, at equal k"
    return [decide("future work", statement, compared(NMSE, pairs, names=("BatchTopK", "TopK")), used)]
