"""Probe loss: for each binary task the best latent's 1-d logistic probe, chosen on one half and scored on the other.

Gao et al. 2406.04093, section 4.1. The minimum over latents is biased low on the tokens it is taken on, hence the
second half. Letters: M tokens of a sample, F units, K tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.base.errors import UserError
from evaluate.feature_metrics import logistic
from evaluate.feature_metrics.bases import Basis
from evaluate.feature_metrics.sample import FeatureText, Sample
from evaluate.feature_metrics.tasks import UNKNOWN, Answers, Task, TokenTexts, answers

LEAST = 20  # tokens that must answer yes, and no, in either half
BLOCK = 64  # units probed together: their values stay in the processor's cache


@dataclass(frozen=True)
class Questions:
    """The tasks that the text can be asked, their answers [K, M] on the sample of each half, and those left out."""

    names: list[str]
    chosen: Answers
    scored: Answers
    left_out: list[str]


def make_questions(text: FeatureText, tasks: Sequence[Task], samples: tuple[Sample, Sample]) -> Questions:
    """Choose the tasks that both samples can answer; UserError where none is left."""
    texts = TokenTexts(text.tokenizer)
    halves = [_answers(text, tasks, texts, sample) for sample in samples]
    counts = [np.stack([(y == 1).sum(1), (y == 0).sum(1)]).min(0) for y in halves]
    fit = np.minimum(*counts) >= LEAST
    if not fit.any():
        raise UserError(f"no task has {LEAST} tokens that answer yes and {LEAST} no in each half: score more tokens")
    names = [task.name for task in tasks]
    answerable = [name for name, good in zip(names, fit, strict=True) if good]
    return Questions(answerable, halves[0][fit], halves[1][fit], [name for name in names if name not in answerable])


def _answers(text: FeatureText, tasks: Sequence[Task], texts: TokenTexts, sample: Sample) -> Answers:
    answers_KM = np.empty((len(tasks), len(sample.sequence_M)), np.int8)
    for sequence in np.unique(sample.sequence_M):
        low, high = np.searchsorted(sample.sequence_M, [sequence, sequence + 1])
        answers_KM[:, low:high] = answers(tasks, texts, text.packed, int(sequence))[:, sample.position_M[low:high]]
    return answers_KM


def choose_candidates(
    basis: Basis, x_MX: Tensor, answers_KM: Answers, on_progress: Callable[[int], Any]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose for each task the unit with the lowest loss, [K], and that loss.

    `on_progress` is called with the number of units x tasks that were fitted.
    """
    tasks = len(answers_KM)
    best, unit = np.full(tasks, np.inf), np.zeros(tasks, np.int64)
    rows = [torch.from_numpy(np.flatnonzero(y != UNKNOWN)).to(x_MX.device) for y in answers_KM]
    for first in range(0, basis.width, BLOCK):
        z_MC = basis.values(x_MX, slice(first, first + BLOCK))
        for task, y_M in enumerate(answers_KM):
            whole = len(rows[task]) == len(y_M)
            y = torch.from_numpy(y_M).to(z_MC)[rows[task]]
            loss_C = logistic.fit_logistic(z_MC if whole else z_MC[rows[task]], y).loss_C
            at = int(loss_C.argmin())
            if float(loss_C[at]) < best[task]:
                best[task], unit[task] = float(loss_C[at]), first + at
        on_progress(z_MC.shape[1] * tasks)
    return unit, best


def refit(
    basis: Basis, unit: int, halves: tuple[Tensor, Tensor], labels: tuple[Answers, Answers]
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Fit again in float64 and return the unit's loss on the first half; its loss, and that of the base rate, on each
    token of the second (NaN where the task has no answer)."""
    (z, y), (z2, y2) = (
        (basis.values(x, slice(unit, unit + 1)).cpu()[known].double(), torch.from_numpy(label[known]).double())
        for x, label, known in ((x, label, label != UNKNOWN) for x, label in zip(halves, labels, strict=True))
    )
    fit = logistic.fit_logistic(z, y)
    rate = torch.logit(y.mean())
    result = np.full((2, len(labels[1])), np.nan)
    known = labels[1] != UNKNOWN
    result[0, known] = logistic.cross_entropy(fit.weight_C * z2 + fit.bias_C, y2)[:, 0].numpy()
    result[1, known] = logistic.cross_entropy(rate.expand(len(y2), 1), y2)[:, 0].numpy()
    return float(fit.loss_C), result[0], result[1]


def probe(
    basis: Basis,
    samples: tuple[Sample, Sample],
    questions: Questions,
    *,
    bootstrap: int,
    seed: int,
    on_progress: Callable[[int], Any],
) -> dict[str, Any]:
    """Probe: return the mean loss over the tasks in nats, that of the base rates, and each task's unit and losses."""
    halves = tuple(sample.reads[basis.of_neurons] for sample in samples)
    assert len(halves) == 2
    units, _ = choose_candidates(basis, halves[0], questions.chosen, on_progress)
    document_M = samples[1].document_M
    documents = np.unique(document_M)
    tasks: dict[str, Any] = {}
    sums = []  # [K, 2, documents]: loss and tokens of each document
    for name, unit, *labels in zip(questions.names, units, questions.chosen, questions.scored, strict=True):
        first, loss_M, base_M = refit(basis, int(unit), halves, (labels[0], labels[1]))
        known = ~np.isnan(loss_M)
        tasks[name] = {
            "unit": int(unit),
            "loss_chosen": first,
            "loss": float(loss_M[known].mean()),
            "loss_base_rate": float(base_M[known].mean()),
            "positive": float((labels[1][known] == 1).mean()),
        }
        at = np.searchsorted(documents, document_M[known])
        size = len(documents)
        sums.append([np.bincount(at, loss_M[known], size), np.bincount(at, minlength=size)])
    table = np.array(sums)
    loss = interval(table.transpose(2, 0, 1), lambda drawn: float((drawn[:, 0] / drawn[:, 1]).mean()), bootstrap, seed)
    base = float(np.mean([task["loss_base_rate"] for task in tasks.values()]))
    return {"loss": loss, "loss_base_rate": base, "tasks": tasks}


def interval(
    items: NDArray[np.float64], statistic: Callable[[NDArray[np.float64]], float], samples: int, seed: int
) -> dict[str, float | None]:
    """Estimate `statistic` of the sum over items (first axis), its standard error and 95% percentile interval by
    bootstrap over the items; None for what is not known."""
    if not len(items):
        return dict.fromkeys(("value", "se", "low", "high"))
    rng, count = np.random.default_rng(seed), len(items)
    flat = items.reshape(count, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = statistic(items.sum(0))
        draws = np.array(
            [
                statistic(
                    (np.bincount(rng.integers(count, size=count), minlength=count) @ flat).reshape(items.shape[1:])
                )
                for _ in range(samples)
            ]
        )
    draws = draws[np.isfinite(draws)]
    known = count > 1 and len(draws) > 1
    low, high = np.percentile(draws, [2.5, 97.5]) if known else (None, None)
    return {
        "value": value if np.isfinite(value) else None,
        "se": float(draws.std(ddof=1)) if known else None,
        "low": None if low is None else float(low),
        "high": None if high is None else float(high),
    }
