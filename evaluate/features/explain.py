"""`python -m evaluate.features.explain`: a label for each latent from a language model, and how well it foretells.

A model is shown a latent's top contexts and says what they share. Asked with that label alone, it then says of contexts
it has not seen which ones fit: half are of the latent (drawn from its firings), half are of other latents, at random.
Detection scoring, as in Paulo et al. (2410.13928); guessing gives an accuracy of 1/2. The pages do not have every
firing, so a context of another latent may hold one of the latent's own: where it fires often, the score is too low.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from data.base.cli import run, stage_settings
from data.base.errors import UserError
from data.base.records import Json
from evaluate.config import ExplainSettings
from evaluate.features.chat_api import ChatApi
from evaluate.features.page_data import Context, PageData

LABELLER = (
    "You explain latents of a sparse autoencoder. You see excerpts of text on which one latent is active; the tokens "
    "on which it fires are between << and >>. Say in at most 12 words what these tokens have in common. Answer with "
    "the explanation alone."
)
JUDGE = (
    "You are given an explanation of when a latent is active, and numbered excerpts of text. Answer with the numbers "
    "of the excerpts in which the explanation fits some token, separated by commas, or with the word none."
)
LETTERS_A_TOKEN = 4  # about, in English
LONGEST_LABEL = 200  # letters
Z = 1.96  # of a 95% interval


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share by Wilson's score (1927)."""
    share, scale = hits / count, 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / scale
    half = Z / scale * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


class Detection:
    """The contexts that a label of one latent is tried on, in an order drawn at random."""

    def __init__(self, positives: Sequence[Context], negatives: Sequence[Context], rng: np.random.Generator) -> None:
        both = [*((one, True) for one in positives), *((one, False) for one in negatives)]
        self.contexts = [both[i] for i in rng.permutation(len(both))]

    def question(self, label: str) -> str:
        """Return the question for the judge."""
        lines = [f"{i}. {_one_line(context.text)}" for i, (context, _) in enumerate(self.contexts, 1)]
        return f"Explanation: {label}\n\n" + "\n".join(lines)

    def hits(self, answer: str) -> int:
        """Count the contexts that the answer sorts rightly."""
        chosen = {int(number) for number in re.findall(r"\d+", answer)}
        return sum((i in chosen) == fires for i, (_, fires) in enumerate(self.contexts, 1))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def labelling_question(contexts: Sequence[Context]) -> str:
    """Return the question for a label."""
    return "\n".join(f"{i}. {_one_line(context.marked)}" for i, context in enumerate(contexts, 1))


def detection_of(data: PageData, latent: int, settings: ExplainSettings) -> Detection | None:
    """Choose the contexts for one latent; None where it has fewer than two that its label was not made from."""
    rng = np.random.default_rng([settings.seed, latent])
    top, drawn = data.examples(latent)
    seen = {context.place for context in top}
    positives = [context for context in drawn if context.place not in seen][: settings.held_out]
    firing = {context.place[0] for context in (*top, *drawn)}
    negatives: list[Context] = []
    for other in rng.permutation(data.width).tolist():
        if len(negatives) == len(positives):
            break
        # In another context of the text than any of the latent's own, where it is not known to fire.
        fitting = [one for one in data.examples(other)[1] if one.place[0] not in firing] if other != latent else []
        negatives += [fitting[int(rng.integers(len(fitting)))]] if fitting else []
    both = min(len(positives), len(negatives))
    return Detection(positives[:both], negatives[:both], rng) if both >= 2 else None


def chosen_latents(data: PageData, settings: ExplainSettings) -> list[int]:
    """Return the latents that are asked for, or the most interesting ones that fire."""
    if settings.latents:
        beyond = [latent for latent in settings.latents if latent >= data.width]
        if beyond:
            raise UserError(f"latents={beyond[0]} is beyond the last of {data.width}: they are numbered from 0")
        return settings.latents
    interest = data.index["interest"]
    order = sorted(range(data.width), key=lambda latent: (-interest[latent], latent))
    return [latent for latent in order if data.index["fired"][latent]][: settings.count]


def cost_line(sent: Sequence[str]) -> str:
    """Say how much will be sent, of each request its instructions and its question."""
    tokens = sum(map(len, sent)) // LETTERS_A_TOKEN
    return f"{len(sent):,} requests of about {tokens:,} tokens in all, and answers of a line each"


def explain_latents(config: dict[str, Any]) -> Path:
    """Label the latents that a resolved configuration names (evaluate/config.py); the path of the pages.

    Labels are written after each latent, and a latent that the same model has labelled is not asked for again.
    """
    settings = ExplainSettings.of(config)
    data = PageData(Path(settings.pages or ""))
    api = ChatApi(settings.url or "", settings.chat_model or "", settings.key_env)
    labels = data.labels
    latents = [i for i in chosen_latents(data, settings) if labels.get(str(i), {}).get("model") != settings.chat_model]
    detections = {latent: detection_of(data, latent, settings) for latent in latents}
    questions = {latent: labelling_question(data.examples(latent)[0]) for latent in latents}
    trials = [JUDGE + detection.question("") for detection in detections.values() if detection]
    sent = [*(LABELLER + question for question in questions.values()), *trials]
    print(f"{len(latents)} latents: {cost_line(sent)}")
    if not settings.spend:
        print("nothing was asked: give spend=true to go on")
        return data.folder / "index.html"
    accuracies = []
    for latent in latents:
        label = _one_line(api.ask(LABELLER, questions[latent]))[:LONGEST_LABEL]
        record: Json = {"label": label, "model": settings.chat_model}
        detection = detections[latent]
        if detection is not None:
            hits, count = detection.hits(api.ask(JUDGE, detection.question(label))), len(detection.contexts)
            low, high = wilson(hits, count)
            accuracies.append(hits / count)
            record |= {"accuracy": hits / count, "contexts": count, "low": low, "high": high}
            record["score"] = f"detection {hits / count:.2f} [{low:.2f}, {high:.2f}] on {count} contexts"
        labels[str(latent)] = record
        data.write_labels(labels)
        print(f"#{latent}  {label}  {record.get('score', 'not scored: too few other contexts')}", flush=True)
    print(
        f"{api.requests:,} requests, {api.tokens:,} tokens by the server's count{_mean_line(accuracies, settings.seed)}"
    )
    return data.folder / "index.html"


def _mean_line(accuracies: Sequence[float], seed: int) -> str:
    """Say the mean accuracy with its interval by the bootstrap over latents."""
    if len(accuracies) < 2:
        return ""
    rng = np.random.default_rng(seed)
    draws = rng.choice(accuracies, size=(1000, len(accuracies))).mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    mean = sum(accuracies) / len(accuracies)
    return f"; mean detection {mean:.2f} [{low:.2f}, {high:.2f}] over {len(accuracies)} latents, 0.5 by guessing"


def main(config: DictConfig) -> None:
    """Run the stage on Hydra's configuration."""
    print(f"feature pages: {explain_latents(stage_settings(config, 'explain'))}")


if __name__ == "__main__":
    run(main, "explain")
