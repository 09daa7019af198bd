"""Downstream sparsity: how few of the next tokens' logits a single active latent moves.

Gao et al. 2406.04093, section 4.3. At a random token a random active latent's part is taken from the site's tensor,
the rest of it untouched. Of the differences of the logits, at this and the next AFTER tokens, the median over the
vocabulary is subtracted at each token; of all V * T values d the figure is (||d||_1 / ||d||_2)^2 / (V T), near 1 where
every logit moves alike and near 0 where few do. Letters: A ablations of a context, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.base.errors import UserError
from evaluate.feature_metrics.bases import Basis
from evaluate.feature_metrics.probe import interval
from evaluate.feature_metrics.sample import FeatureText
from harvest.hooks import replace

AFTER = 16


def sparsity(d_ATV: Float[Tensor, "A T V"]) -> Float[Tensor, " A"]:
    """Compute (||d||_1 / ||d||_2)^2 / (V T) after the median over V (of an even V the lower) is taken from each token;
    NaN where nothing moves."""
    d = (d_ATV.double() - d_ATV.double().median(-1, keepdim=True).values).flatten(1)
    return d.abs().sum(1).square() / d.square().sum(1) / d.shape[1]


def places(text: FeatureText, contexts: int, seed: int) -> list[tuple[int, int]]:
    """Draw (context, position) of seeded random kept tokens of the second half, one a context,
    with AFTER more to come."""
    length = text.packed.contexts.shape[1]
    if length <= AFTER:
        raise UserError(
            f"the ablation looks {AFTER} tokens ahead and contexts have {length}: leave it out of feature_metrics"
        )
    # The second half, as probes and patterns are scored on it; a stream of random numbers of its own, so that no other
    # metric moves it.
    rng, half = np.random.default_rng([seed, 7]), text.half(True)
    chosen = []
    for context in rng.permutation(np.arange(half.start, half.stop)).tolist():
        scored = np.flatnonzero(text.packed.keep[context, : length - AFTER])
        if len(scored):
            chosen.append((context, int(rng.choice(scored))))
        if len(chosen) == contexts:
            break
    return sorted(chosen)


@torch.inference_mode()
def ablate(text: FeatureText, basis: Basis, place: tuple[int, int], count: int, rng: np.random.Generator) -> Tensor:
    """Measure at most `count` units active at a place, [A],
    in one forward with the clean one beside them."""
    context, position = place
    reader = text.reader
    device = text.heldout.device
    ids_1T = torch.from_numpy(text.packed.contexts[context : context + 1, : position + AFTER + 1]).to(
        device, torch.int64
    )
    row_1X = reader.read(ids_1T)[basis.of_neurons][:, position]
    f_F = basis.active(row_1X)[0]
    active = f_F.nonzero().squeeze(1).cpu().numpy()
    if not len(active):
        return torch.zeros(0)
    units = torch.from_numpy(np.sort(rng.choice(active, min(count, len(active)), replace=False))).to(device)
    part_AD = basis.part(row_1X.expand(len(units), -1), f_F[units], units)

    def put(x_BTD: Tensor) -> Tensor:
        changed = x_BTD.clone()
        # Row 0 stays clean: both come from one batch, so what kernels of another batch size would round otherwise
        # cancels.
        changed[1:, position] -= part_AD.to(changed)
        return changed

    with replace(reader.model, reader.site, put):
        ids = ids_1T.expand(1 + len(units), -1)
        logits = reader.model(input_ids=ids, use_cache=False).logits[:, position:].float()
    return sparsity(logits[1:] - logits[:1]).cpu()


def downstream(
    text: FeatureText,
    basis: Basis,
    *,
    contexts: int,
    count: int,
    bootstrap: int,
    seed: int,
    on_progress: Callable[[int], Any],
) -> dict[str, Any]:
    """Return the mean sparsity over ablations, with an interval over documents;
    how many there were and how many moved nothing."""
    rng = np.random.default_rng([seed, 11])
    documents = text.heldout.documents
    by_document: dict[int, list[float]] = {}  # sum of the figures and their number
    ablations, without_effect = 0, 0
    for context, position in places(text, contexts, seed):
        figures = ablate(text, basis, (context, position), count, rng)
        moved = figures[figures.isfinite()]
        ablations += len(figures)
        without_effect += len(figures) - len(moved)
        if len(moved):
            number = int(documents.numbers(range(context, context + 1))[0, position])
            total, n_figures = by_document.get(number, [0.0, 0.0])
            by_document[number] = [total + float(moved.sum()), n_figures + float(len(moved))]
        on_progress(1)
    items = np.array(list(by_document.values())).reshape(-1, 2)
    figure = interval(items, lambda drawn: float(drawn[0] / drawn[1]), bootstrap, seed)
    return {"fraction": figure, "ablations": ablations, "without_effect": without_effect}
