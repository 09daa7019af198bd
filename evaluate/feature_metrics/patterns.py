"""Explainability: how well short token patterns foretell where a latent fires.

After Neuron to Graph (Foote et al. 2305.19911) in the short form of Gao et al. 2406.04093, section 4.2. Of each
sampled latent, E tokens where it fires are drawn from the first half of the text. For each the shortest ending of its
context, of at most LONGEST tokens, on which the latent still has half its activation is sought; then each token of
that is replaced by others of the text, and is a wildcard (ANY) where the latent keeps half of what it had. On the
second half the latent is foretold wherever a pattern ends. Letters: T tokens of a context, U sampled units, E examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from evaluate.feature_metrics.bases import Basis
from evaluate.feature_metrics.probe import interval
from evaluate.feature_metrics.sample import FeatureText, draw

LONGEST = 16  # tokens of a pattern
HALF = 0.5  # of the activation must be left
SUBSTITUTES = 3  # random tokens that stand in, one after the other, for the one in question; their mean counts
OTHERS = 8192  # tokens of the text that substitutes are drawn from
ANY = -1
TOKENS_AT_ONCE = 1 << 13  # of cut-out texts in a forward

Pattern = tuple[int, ...]
Activation = Callable[[Tensor, Tensor], Tensor]  # of units [n] at the last token of ids [n, m]: [n]
OnProgress = Callable[[int], Any]


@dataclass(frozen=True)
class Examples:
    """n tokens on which a sampled unit fires: which of the sampled units, its activation, the ids that end there."""

    unit_n: Tensor
    f_n: Tensor
    ids_nL: Tensor  # [n, LONGEST], ANY where the context begins later


def examples(
    text: FeatureText, basis: Basis, units_U: Tensor, count: int, seed: int, on_progress: OnProgress
) -> Examples:
    """Choose at most `count` tokens of the first half for each unit, drawn at random from those where it fires.

    Every firing token gets a random rank; the lowest of each unit stay. Memory does not grow with the text.
    """
    rng = torch.Generator().manual_seed(seed)
    rank = torch.full((len(units_U), count), torch.inf)
    f = torch.zeros(len(units_U), count)
    ids = torch.full((len(units_U), count, LONGEST), ANY)
    for batch in text.batches(text.half(False)):
        ids_BT, keep_BT = batch.ids_BT, batch.keep_BT
        f_NU = _active(text, basis, ids_BT, keep_BT)[:, units_U.to(ids_BT.device)].cpu()
        ends_NL = _endings(ids_BT.cpu())[keep_BT.cpu()]
        ranks_UN = torch.where(f_NU.t() > 0, torch.rand(f_NU.t().shape, generator=rng), torch.inf)
        low_Uk = ranks_UN.topk(min(count, ranks_UN.shape[1]), dim=1, largest=False)
        rank, order = torch.cat([rank, low_Uk.values], 1).topk(count, dim=1, largest=False)
        f = torch.cat([f, f_NU.t().gather(1, low_Uk.indices)], 1).gather(1, order)
        ids = torch.cat([ids, ends_NL[low_Uk.indices]], 1).gather(1, order[:, :, None].expand(-1, -1, LONGEST))
        on_progress(len(batch.numbers))
    unit, number = rank.isfinite().nonzero(as_tuple=True)
    return Examples(unit, f[unit, number], ids[unit, number])


def _endings(ids_BT: Int64[Tensor, "B T"]) -> Int64[Tensor, "B T longest"]:
    """Return the LONGEST tokens that end at each token, ANY before the context."""
    before = torch.full((len(ids_BT), LONGEST - 1), ANY)
    return torch.cat([before, ids_BT], 1).unfold(1, LONGEST, 1)


def _active(text: FeatureText, basis: Basis, ids_BT: Tensor, keep_BT: Tensor) -> Tensor:
    return basis.active(text.reader.read(ids_BT)[basis.of_neurons][keep_BT])


def activation_at_end(text: FeatureText, basis: Basis, units_U: Tensor, on_forward: Callable[[], Any]) -> Activation:
    """Make what reads cut-out texts, behind a BOS where the packing has one;
    `on_forward` is called after each forward."""
    device = text.heldout.device

    def at_end(unit_n: Tensor, ids_nm: Tensor) -> Tensor:
        if not len(unit_n):
            return torch.zeros(0)
        if text.bos is not None:
            ids_nm = torch.cat([torch.full((len(ids_nm), 1), text.bos), ids_nm], 1)
        parts, rows = [], max(1, TOKENS_AT_ONCE // ids_nm.shape[1])
        for unit, ids in zip(torch.split(unit_n, rows), torch.split(ids_nm, rows), strict=True):
            x_nX = text.reader.read(ids.to(device))[basis.of_neurons][:, -1]
            parts.append(basis.active(x_nX).cpu().gather(1, units_U[unit][:, None])[:, 0])
            on_forward()
        return torch.cat(parts)

    return at_end


def shortest(sampled: Examples, at_end: Activation) -> Tensor:
    """Find how many tokens each example needs to fire at half strength, [n]; 0 where all there are do not do."""
    length_n = torch.zeros(len(sampled.f_n), dtype=torch.int64)
    for length in range(1, LONGEST + 1):
        left = ((length_n == 0) & (sampled.ids_nL[:, -length] != ANY)).nonzero().squeeze(1)
        f = at_end(sampled.unit_n[left], sampled.ids_nL[left, -length:])
        length_n[left[f >= HALF * sampled.f_n[left]]] = length
    return length_n


def patterns(sampled: Examples, at_end: Activation, others: Tensor, seed: int) -> list[set[Pattern]]:
    """Find the patterns of each sampled unit (as many as `sampled` knows), ANY for a token that does not matter.

    others: ids of the text to draw substitutes from. A pattern begins with a token that matters; one in which none
    does is dropped, for it would foretell the unit everywhere.
    """
    rng = torch.Generator().manual_seed(seed)
    length_n = shortest(sampled, at_end)
    ids_nL = sampled.ids_nL.clone()
    for place in range(1, LONGEST + 1):
        for length in range(place, LONGEST + 1):
            some = (length_n == length).nonzero().squeeze(1)
            if not len(some):
                continue
            cut = sampled.ids_nL[some, -length:].repeat(SUBSTITUTES, 1)
            cut[:, -place] = substitutes(others, cut[:, -place], rng)
            f = at_end(sampled.unit_n[some].repeat(SUBSTITUTES), cut).view(SUBSTITUTES, -1).mean(0)
            ids_nL[some[f >= HALF * sampled.f_n[some]], -place] = ANY
    units: list[set[Pattern]] = [set() for _ in range(int(sampled.unit_n.max()) + 1 if len(sampled.unit_n) else 0)]
    for unit, length, ids in zip(sampled.unit_n.tolist(), length_n.tolist(), ids_nL.tolist(), strict=True):
        mattering = [at for at in range(LONGEST - length, LONGEST) if ids[at] != ANY]
        if mattering:
            units[unit].add(tuple(ids[mattering[0] :]))
    return units


def substitutes(others: Int64[Tensor, " M"], ids_n: Int64[Tensor, " n"], rng: torch.Generator) -> Int64[Tensor, " n"]:
    """Draw a token of `others` for each token, never that token itself: a draw that is, is made again.

    Where `others` has no other token, the token stands for itself.
    """
    drawn_n = others[torch.randint(len(others), (len(ids_n),), generator=rng)]
    if bool((others == others[0]).all()):
        return drawn_n
    while len(same := (drawn_n == ids_n).nonzero().squeeze(1)):
        drawn_n[same] = others[torch.randint(len(others), (len(same),), generator=rng)]
    return drawn_n


def foretold(ids_BT: Int64[Tensor, "B T"], known: set[Pattern]) -> Bool[Tensor, "B T"]:
    """Mark the tokens at which one of the patterns ends, all of it within the context."""
    hit_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for pattern in known:
        width = ids_BT.shape[1] - len(pattern) + 1
        if width <= 0:
            continue
        match = torch.ones(len(ids_BT), width, dtype=torch.bool, device=ids_BT.device)
        for at, token in enumerate(pattern):
            if token != ANY:
                match &= ids_BT[:, at : at + width] == token
        hit_BT[:, len(pattern) - 1 :] |= match
    return hit_BT


def score(
    text: FeatureText, basis: Basis, units_U: Tensor, known: list[set[Pattern]], on_progress: OnProgress
) -> Tensor:
    """Sum over the second half for each unit, [U, 5]:
    foretold and firing, foretold, firing, activation foretold, activation."""
    sums = torch.zeros(len(units_U), 5, dtype=torch.float64)
    for batch in text.batches(text.half(True)):
        ids_BT, keep_BT = batch.ids_BT, batch.keep_BT
        f_NU = _active(text, basis, ids_BT, keep_BT)[:, units_U.to(ids_BT.device)]
        for unit, own in enumerate(known):
            hit_N, f_N = foretold(ids_BT, own)[keep_BT], f_NU[:, unit].double()
            fires_N = f_N > 0
            counted = (hit_N & fires_N).sum(), hit_N.sum(), fires_N.sum(), f_N[hit_N].sum(), f_N.sum()
            sums[unit] += torch.stack([c.double() for c in counted]).cpu()
        on_progress(len(batch.numbers))
    return sums


def explain(
    text: FeatureText,
    basis: Basis,
    *,
    units: int,
    count: int,
    bootstrap: int,
    seed: int,
    on_progress: OnProgress,
    on_forward: Callable[[], Any],
) -> dict[str, Any]:
    """Return precision, recall and F1 of the patterns, means over the sampled units that fire in both halves, with
    intervals over units; each unit's sums and patterns."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(basis.width, min(units, basis.width), replace=False))
    units_U = torch.from_numpy(chosen).long()
    sampled = examples(text, basis, units_U, count, seed, on_progress)
    others = torch.from_numpy(text.packed.contexts[draw(text.packed.keep, text.half(False), OTHERS, seed)]).long()
    at_end = activation_at_end(text, basis, units_U, on_forward)
    known = patterns(sampled, at_end, others, seed)
    known += [set() for _ in range(len(units_U) - len(known))]
    sums = score(text, basis, units_U, known, on_progress).numpy()
    tested = [i for i in range(len(chosen)) if sums[i, 2] > 0 and bool((sampled.unit_n == i).any())]
    table = np.array([_figures(sums[i]) for i in tested]).reshape(-1, 4)
    result: dict[str, Any] = {"units": len(chosen), "tested": len(tested)}
    for at, name in enumerate(("precision", "recall", "recall_activation", "f1")):
        items = np.stack([table[:, at], np.ones(len(table))], 1)
        result[name] = interval(items, lambda drawn: float(drawn[0] / drawn[1]), bootstrap, seed)
    result["of_units"] = [
        {"unit": int(chosen[i]), "patterns": sorted(map(list, known[i])), "precision": p, "recall": r}
        for i, (p, r, *_) in zip(tested, table.tolist(), strict=True)
    ]
    return result


def _figures(sums: np.ndarray[Any, Any]) -> tuple[float, float, float, float]:
    """Compute precision (0 where nothing is foretold), recall, share of the activation foretold, F1."""
    both, n_foretold, n_firing, f_foretold, f_all = sums
    precision = both / n_foretold if n_foretold else 0.0
    recall = both / n_firing
    return precision, recall, f_foretold / f_all, 2 * both / (n_foretold + n_firing)
