"""The feature metrics of one site: what they will cost is said first, then each for all bases, with its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.base.cli import CONF
from data.base.progress import progress
from evaluate.config import EvaluateSettings
from evaluate.feature_metrics import logistic
from evaluate.feature_metrics.ablation import AFTER, downstream
from evaluate.feature_metrics.bases import Basis, Directions, Neurons, SAEBasis
from evaluate.feature_metrics.patterns import LONGEST, SUBSTITUTES, explain
from evaluate.feature_metrics.probe import BLOCK, make_questions, probe
from evaluate.feature_metrics.sample import FeatureText, Sample, take
from evaluate.feature_metrics.tasks import Task, load_tasks
from train.sae.base import SAE
from train.sae.parts.init import directions

COUNTS = ("probe_tokens", "units", "examples", "places", "ablations")


@dataclass(frozen=True)
class FeatureMetricsConfig:
    """Which feature metrics to measure, and how; the tasks are read."""

    metrics: tuple[str, ...]
    tasks: list[Task]
    baselines: tuple[str, ...]
    probe_tokens: int
    units: int
    examples: int
    places: int
    ablations: int
    bootstrap: int
    seed: int

    @classmethod
    def of(cls, settings: EvaluateSettings) -> FeatureMetricsConfig | None:
        """Read the tasks that the settings name; None where no feature metric is to be measured."""
        if not settings.feature_metrics:
            return None
        own = settings.feature_metrics_with
        tasks = []
        if "probe" in settings.feature_metrics:
            tasks = load_tasks(CONF / "probes.yaml" if own.tasks is None else Path(own.tasks))
        return cls(
            metrics=tuple(settings.feature_metrics),
            tasks=tasks,
            baselines=tuple(own.baselines),
            **{name: getattr(own, name) for name in COUNTS},
            bootstrap=settings.bootstrap,
            seed=settings.seed,
        )


def bases_of(
    saes: Mapping[str, SAE],
    baselines: Sequence[str],
    sample: Sample,
    mean_D: Tensor,
    density: float,
    neurons: Neurons | None,
    seed: int,
) -> list[Basis]:
    """Return the SAEs by name, then the baselines; neurons are left out where the site has none."""
    x_MD = sample.reads[False]
    mean_D, width = mean_D.to(x_MD), x_MD.shape[1]
    bases: list[Basis] = [SAEBasis(name, sae.to(x_MD.device).eval()) for name, sae in saes.items()]
    if "channels" in baselines:
        eye = torch.eye(width, device=x_MD.device)
        bases.append(Directions("residual channels", None, mean_D, eye, x_MD, density))
    if "neurons" in baselines and neurons is not None:
        h_MH, out_HD = sample.reads[True], neurons.out_HD
        centre_H = torch.zeros_like(h_MH[0])
        bases.append(Directions("MLP neurons", None, centre_H, out_HD, h_MH, density, of_neurons=True))
    if "random" in baselines:
        rows_FD = directions(max(sae.width for sae in saes.values()), width, seed).to(x_MD)
        bases.append(Directions("random directions", rows_FD, mean_D, rows_FD, x_MD, density))
    if "pca" in baselines:
        moved = (x_MD - mean_D).double().cpu()
        rows_DD = torch.linalg.eigh(moved.t() @ moved).eigenvectors.t().flip(0).to(x_MD).contiguous()
        bases.append(Directions("PCA", rows_DD, mean_D, rows_DD, x_MD, density))
    return bases


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def announce(metric: str, work: str, cost: float) -> None:
    print(f"feature metrics, {metric}: {work}; about {cost / 60:.1f} min", flush=True)


def bar(metric: str, total: int, unit: str) -> Any:
    return progress(f"feature metrics, {metric}", total, unit, lines=5)


class FeatureMetricsRun:
    """The run over one site; `read_s` and `whole_s` are seconds a token of the LM as far as the site and to its end."""

    def __init__(self, text: FeatureText, settings: FeatureMetricsConfig) -> None:
        self.text, self.settings = text, settings
        self.sequences, self.context = text.packed.contexts.shape
        text.half(True)  # says at once where there are too few contexts
        ids_BT = next(text.batches(range(min(2, self.sequences)))).ids_BT
        text.reader.read(ids_BT)
        self.read_s = seconds(lambda: text.reader.read(ids_BT)) / ids_BT.numel()
        self.whole_s = seconds(lambda: text.reader.whole(ids_BT)) / ids_BT.numel()

    def samples(self) -> tuple[Sample, Sample]:
        """Draw a sample of each half, for probes and for the baselines' thresholds."""
        tokens = self.text.packed.contexts.size
        announce("sample", f"{tokens:,} tokens through the LM as far as the site", self.read_s * tokens)
        with bar("sample", self.sequences, "contexts") as progress:
            first, second = (
                take(self.text, self.text.half(half), self.settings.probe_tokens, self.settings.seed, progress.update)
                for half in (False, True)
            )
        return first, second

    def probes(self, bases: Sequence[Basis], samples: tuple[Sample, Sample]) -> tuple[list[Any], list[str]]:
        questions = make_questions(self.text, self.settings.tasks, samples)
        fits = sum(basis.width for basis in bases) * len(questions.names)
        z_MC = bases[0].values(samples[0].reads[bases[0].of_neurons], slice(0, BLOCK))
        y = torch.from_numpy(questions.chosen[0]).to(z_MC).clamp_min(0)
        each = seconds(lambda: logistic.fit_logistic(z_MC, y)) / z_MC.shape[1]
        work = f"{len(questions.names)} tasks x {fits // len(questions.names):,} units of {len(bases)} bases"
        tokens = " + ".join(f"{len(sample.sequence_M):,}" for sample in samples)
        announce("probe", f"{work} on {tokens} tokens, no forward pass", each * fits)
        shared = {"bootstrap": self.settings.bootstrap, "seed": self.settings.seed}
        with bar("probe", fits, "fits") as progress:
            results = [probe(basis, samples, questions, **shared, on_progress=progress.update) for basis in bases]
        return results, questions.left_out

    def patterns(self, bases: Sequence[Basis]) -> list[Any]:
        own = self.settings
        lengths = range(1, LONGEST + 1)
        tried = sum(length + 1 for length in lengths) + SUBSTITUTES * LONGEST * (LONGEST + 1)
        cut, read = own.units * own.examples * tried * len(bases), self.text.packed.contexts.size * len(bases)
        work = (
            f"{own.units} units of {len(bases)} bases, {read:,} tokens of contexts and at most {cut:,} of cut-out texts"
        )
        announce("patterns", f"{work} through the LM as far as the site, at most", self.read_s * (cut + read))
        results = []
        with bar("patterns", self.sequences * len(bases), "contexts") as progress:
            for basis in bases:
                progress.set_postfix_str(basis.name)
                counts = {"units": own.units, "count": own.examples, "bootstrap": own.bootstrap, "seed": own.seed}
                results.append(
                    explain(self.text, basis, **counts, on_progress=progress.update, on_forward=progress.refresh)
                )
        return results

    def ablations(self, bases: Sequence[Basis]) -> list[Any]:
        own = self.settings
        places = min(own.places, self.sequences - self.sequences // 2)
        tokens = places * (own.ablations + 1) * (self.context + AFTER) // 2 * len(bases)
        work = f"{places * len(bases):,} forward passes of {1 + own.ablations} contexts, about {tokens:,} tokens"
        announce("ablation", work, self.whole_s * tokens)
        counts = {"contexts": own.places, "count": own.ablations, "bootstrap": own.bootstrap, "seed": own.seed}
        with bar("ablation", places * len(bases), "places") as progress:
            return [downstream(self.text, basis, **counts, on_progress=progress.update) for basis in bases]


@torch.no_grad()
def measure(
    text: FeatureText, saes: Mapping[str, SAE], mean_D: Tensor, density: float, settings: FeatureMetricsConfig
) -> dict[str, Any]:
    """Measure a site and return its part of the report: {"settings", "left_out", "bases": one entry a basis}.

    saes: by the name they have in the report. density: the share of tokens on which a baseline's unit is to be active.
    """
    site = FeatureMetricsRun(text, settings)
    samples = site.samples()
    bases = bases_of(saes, settings.baselines, samples[0], mean_D, density, text.reader.neurons, settings.seed)
    rows: list[dict[str, Any]] = [{"name": basis.name, "width": basis.width} for basis in bases]
    left_out: list[str] = []
    if "probe" in settings.metrics:
        results, left_out = site.probes(bases, samples)
        rows = [{**row, "probe": one} for row, one in zip(rows, results, strict=True)]
    if "patterns" in settings.metrics:
        rows = [{**row, "patterns": one} for row, one in zip(rows, site.patterns(bases), strict=True)]
    if "ablation" in settings.metrics:
        rows = [{**row, "ablation": one} for row, one in zip(rows, site.ablations(bases), strict=True)]
    counts = {name: getattr(settings, name) for name in COUNTS}
    return {"settings": {**counts, "density": density}, "left_out": left_out, "bases": rows}
