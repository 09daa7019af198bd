"""`python -m evaluate.features.neuronpedia`: feature pages as the files that Neuronpedia's importer is fed with.

They are what SAEDashboard's NeuronpediaRunner leaves: `batch-0.json`, `batch-1.json` ... of some latents each, and
`skipped_indexes.json` with the latents that never fired. Neuronpedia's `convert-saedashboard-to-neuronpedia-export.py`
makes its upload of them. What the pages do not have is left empty there: the histogram of all logits, neurons that
correlate, the vector (Neuronpedia finds that in the SAE on the hub).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig

from data.base.cli import run, stage_settings
from data.base.errors import UserError
from data.base.files import refuse_full, write_atomic
from data.base.records import Json
from evaluate.config import NeuronpediaSettings
from evaluate.features.page_data import Context, PageData

LATENTS_A_BATCH = 128
INTERVALS = 5  # of the range of activations, which examples are sorted into; SAEDashboard's number
NO_BIN = -1  # bin_min and bin_contains of the contexts with the largest activations, as SAEDashboard marks them
# What SAEDashboard writes of each latent and the pages do not have.
ABSENT = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector"),
)


@dataclass(frozen=True)
class Interval:
    """Activations from `low` to `high`; share: of all tokens, those with one (in the lowest also those with none)."""

    low: float
    high: float
    share: float


def intervals(counts: list[int], bin_width: float, tokens: int) -> list[Interval]:
    """Cut the range of a latent's activations into up to INTERVALS parts, as equal as whole bins allow.

    counts: firings in equal bins from 0 on. tokens: all there are, on which it fires or not.
    """
    parts = min(INTERVALS, len(counts))
    edges = list(pairwise(len(counts) * i // parts for i in range(parts + 1)))
    inside = [sum(counts[low:high]) for low, high in edges]
    inside[0] += tokens - sum(counts)
    return [
        Interval(low * bin_width, high * bin_width, count / tokens)
        for (low, high), count in zip(edges, inside, strict=True)
    ]


def _activation(context: Context, bin_min: float, bin_max: float, share: float) -> Json:
    return {
        "bin_min": bin_min,
        "bin_max": bin_max,
        "bin_contains": share,
        "tokens": context.tokens,
        "values": context.values,
        "qualifying_token_index": context.peak,
    }


def _activations(data: PageData, latent: int, parts: list[Interval]) -> list[Json]:
    """Return the top contexts, then those drawn at random by the interval of their own token, the highest first."""
    top, drawn = data.examples(latent)
    highest = data.index["max"][latent]
    rows = [_activation(context, NO_BIN, highest, NO_BIN) for context in top]
    for number, part in reversed(list(enumerate(parts))):
        last = number == len(parts) - 1
        for context in drawn:
            value = context.values[context.peak]
            # The pages round values to three digits: the largest may come out above its bin.
            if part.low <= value < part.high or (last and value >= part.high):
                rows.append(_activation(context, part.low, part.high, part.share))
    return rows


def feature(data: PageData, latent: int, dataset: str) -> Json:
    """Return one latent as SAEDashboard writes it."""
    record, tokens = data.record(latent)
    total, counts, width = data.page["tokens"], record["h"], record["w"]
    ends = {sign: record.get(name, []) for sign, name in (("pos", "r"), ("neg", "l"))}
    return {
        "feature_index": latent,
        **{name: [] for name in ABSENT},
        **{f"{sign}_str": [tokens[token] for token, _ in pairs] for sign, pairs in ends.items()},
        **{f"{sign}_values": [value for _, value in pairs] for sign, pairs in ends.items()},
        "frac_nonzero": data.index["fired"][latent] / total,
        "freq_hist_data_bar_values": [(place + 0.5) * width for place in range(len(counts))],
        "freq_hist_data_bar_heights": counts,
        "n_prompts_total": data.page["about"]["contexts"],
        "n_tokens_in_prompt": data.context_length,
        "dataset": dataset,
        "activations": _activations(data, latent, intervals(counts, width, total)),
    }


def _head(data: PageData, settings: NeuronpediaSettings) -> Json:
    """Return what each file says of the SAE: model, layer and set; UserError where the site is of no layer."""
    about = data.page["about"]
    site = about["site"].split(" to ")[0]  # of a transcoder: "<site> to <target>"
    layer = re.search(r"(?:^|\.)(\d+)(?:\.|$)", site)
    if layer is None:
        raise UserError(f"the pages are of {site}, which is in no layer: Neuronpedia sorts SAEs by layer")
    kind = re.sub(r"\W+", "-", site.replace(layer[0], " ").strip().replace("_", "-"))
    name = settings.source_set or f"{about['variant']}-{kind}-{about['width']}"
    return {"model_id": settings.model_id or about["model"], "layer": int(layer[1]), "sae_set": name}


def files(data: PageData, settings: NeuronpediaSettings) -> Iterator[tuple[str, Json]]:
    """Give the name and content of each file, batches of latents that fire and then the list of those that do not."""
    head = _head(data, settings)
    fired = data.index["fired"]
    firing = [latent for latent in range(data.width) if fired[latent]]
    for number, first in enumerate(range(0, len(firing), LATENTS_A_BATCH)):
        latents = firing[first : first + LATENTS_A_BATCH]
        features = [feature(data, latent, settings.dataset) for latent in latents]
        yield f"batch-{number}.json", {**head, "sae_id_suffix": None, "features": features}
    silent = [latent for latent in range(data.width) if not fired[latent]]
    yield "skipped_indexes.json", {**head, "layer": str(head["layer"]), "log_sparsity": 0, "skipped_indexes": silent}


def write_files(settings: NeuronpediaSettings) -> Path:
    """Write the files of feature pages; the folder that they are in."""
    if not settings.pages or not settings.out:
        raise UserError("pages or out is not set: name the feature pages and the folder to write")
    data, out = PageData(Path(settings.pages)), Path(settings.out)
    refuse_full(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files(data, settings):
        write_atomic(out / name, json.dumps(content))
    return out


def main(config: DictConfig) -> None:
    """Run the command from Hydra's configuration."""
    out = write_files(NeuronpediaSettings.of(stage_settings(config, "neuronpedia")))
    print(f"{len(list(out.glob('batch-*.json')))} files of latents: {out}")


if __name__ == "__main__":
    run(main, "neuronpedia")
