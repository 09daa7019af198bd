"""The figures behind the claims: each SAE of a site, in each form a claim asks for, over the same held-out contexts.

Letters: S contexts of T tokens, G documents with a token that is scored, N kept tokens, F latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.claims.forms import rescaled, turned, with_threshold
from benchmarks.claims.verdict import Estimate
from data.base.files import atomic_file
from data.base.progress import progress
from data.base.records import Json, canonical
from data.base.sites import Site
from data.loading.loader import ActivationLoader
from data.loading.order import split_calibration
from data.loading.reader import open_reader
from data.store.manifest import TRAIN
from data.store.store import Store
from evaluate.documents import Documents
from evaluate.forms import BatchForm, InferenceForm
from evaluate.inputs import HeldoutText, SavedSAE, open_text
from evaluate.massive import MassiveRule, rule_of, strictest, without_massive
from evaluate.metrics import Columns, resampled, statistics, totals, without_empty
from evaluate.score import SiteScore, TokenPlaces
from evaluate.splice import Splice
from train.sae.base import SAE
from train.sae.config import RETIRED
from train.sae.io import VARIANTS, load
from train.sae.variants.batchtopk import BatchTopK
from train.sae.variants.topk import TopK
from train.sae.weights_folder import WEIGHTS

FORMAT = 2  # of a score's file; 1 had its sums by context, where documents are what the bootstrap draws
INFERENCE, BATCH, THRESHOLD, PER_TOKEN, RESCALED = "inference", "batch", "threshold", "per token", "rescaled"

_OF_GRID = ("d_in", "width", "k", "target_l0", "sparsity")

Batches = Callable[[], Sequence[Tensor]]

FORMS: dict[str, Callable[[SAE, Batches], SAE | InferenceForm]] = {
    INFERENCE: lambda sae, batches: sae,
    BATCH: lambda sae, batches: BatchForm(turned(sae, BatchTopK)),
    THRESHOLD: lambda sae, batches: with_threshold(sae, batches()),
    PER_TOKEN: lambda sae, batches: turned(sae, TopK),
    RESCALED: lambda sae, batches: rescaled(sae, batches()),
}


@dataclass(frozen=True)
class Candidate:
    """A trained SAE in one of FORMS."""

    trained: SavedSAE
    form: str = INFERENCE


class Scored:
    """An SAE's figures: pooled, resampled, and how its latents fire.

    columns: sums over each document, which the bootstrap draws: tokens of one document are alike.
    counts: [2, G, L0 + 1], each document's tokens by their L0, those after the first position of a context and those
    at it.
    special: whether the rows of special tokens are among them.
    """

    def __init__(
        self,
        candidate: Candidate,
        columns: Columns,
        firing: Json,
        counts: NDArray[np.int32],
        *,
        samples: int,
        seed: int,
        special: bool = False,
    ) -> None:
        self.special = special
        config = candidate.trained.config
        self.form, self.folder = candidate.form, candidate.trained.folder
        self.firing, self.counts = firing, counts
        self.variant: str = config["variant"]
        self.settings: Json = {"k": config["settings"].get("target_l0"), **config["settings"]}
        self.training: Json = config["training"]
        self.width, self.seed, self.tokens = self.settings["width"], self.training["seed"], columns["tokens"].sum()
        self._all, self._drawn = statistics(totals(columns)), statistics(resampled(columns, samples=samples, seed=seed))

    def figure(self, name: str) -> Estimate:
        """Return one of `evaluate.metrics.statistics`."""
        return Estimate(float(self._all[name][0]), self._drawn[name])

    def target(self) -> str:
        """Give the L0 it was trained for, or its coefficient where there was none."""
        k = self.settings["k"]
        return f"k={k:g}" if k is not None else f"sparsity={self.settings['sparsity']:g}"

    @cached_property
    def options(self) -> Json:
        """Return the settings that are not the variant's defaults, beside width and sparsity."""
        return options({"variant": self.variant, "settings": self.settings})


def options(config: Json) -> Json:
    """Return the settings of an SAE's record that are not its variant's defaults, beside width and sparsity."""
    fields = VARIANTS[config["variant"]].Config.model_fields
    defaults = RETIRED | {name: field.default for name, field in fields.items()}
    given = {name: value for name, value in config["settings"].items() if name not in _OF_GRID}
    return {name: value for name, value in given.items() if value != defaults.get(name)}


class TokenL0:
    """Notes the L0 of each token that an SAE is scored on."""

    def __init__(self) -> None:
        self.l0: list[Tensor] = []

    def update(self, f_NF: Tensor, places: TokenPlaces) -> None:
        """Take in the activations of N tokens."""
        self.l0.append((f_NF > 0).sum(1).cpu())


class ScoredSite:
    """One site of one store: its held-out text, and training rows that no optimizer saw."""

    def __init__(self, store: Store, site: str, settings: Mapping[str, Any]) -> None:
        self.store, self.site, self.settings = store, site, settings
        self._batches: dict[tuple[int, int], list[Tensor]] = {}

    @property
    def special(self) -> bool:
        """Return whether the rows of special tokens are among those stored and scored."""
        return bool(self.store.manifest.settings["packing"]["keep_special"])

    @cached_property
    def text(self) -> HeldoutText:
        """Return the LM and the held-out contexts; opened when first needed, as scores that exist need neither."""
        return open_text(self.store, self.settings)

    def batches(self, trained: SavedSAE) -> Sequence[Tensor]:
        """Return the calibration rows in batches as the SAE was trained in, in model units."""
        training = trained.config["training"]
        key = (training["batch"], training["seed"])
        if key not in self._batches:
            reader = open_reader(self.store, TRAIN, self.site)
            _, chunks = split_calibration(reader.sizes, self.settings["calibration_tokens"], training["seed"])
            loader = ActivationLoader(reader, batch=training["batch"], chunks=chunks, seed=training["seed"])
            decode = self.store.decoder(TRAIN, self.site)
            self._batches[key] = [decode(rows).float() for rows in loader]
        return self._batches[key]

    def score(self, candidates: Sequence[Candidate], folder: Path) -> list[Scored]:
        """Score each; scores that lie in `folder` are taken from there, new ones are written there."""
        # Rows that an SAE was trained without are scored for none of the site's SAEs, as in `python -m evaluate`.
        rule = strictest([rule_of(one.trained) for one in candidates])
        paths = [folder / f"{self._key(one, rule)}.npz" for one in candidates]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            self._measure([candidates[i] for i in missing], [paths[i] for i in missing], rule)
        draws = {"samples": self.settings["bootstrap"], "seed": self.settings["seed"], "special": self.special}
        return [Scored(one, *_read(path), **draws) for one, path in zip(candidates, paths, strict=True)]

    def _key(self, candidate: Candidate, rule: MassiveRule | None) -> str:
        """Hash what a score depends on."""
        weights = hashlib.sha256((candidate.trained.folder / WEIGHTS).read_bytes()).hexdigest()
        settings = {name: self.settings[name] for name in ("tokens", "lm_batch", "calibration_tokens")}
        place: list[Any] = [self.store.manifest.fingerprint, self.site]
        if rule is not None:
            place.append([rule.times, rule.median])
        form = "shipped" if candidate.form == INFERENCE else candidate.form  # the inference form's name in older scores
        parts = canonical([FORMAT, weights, form, candidate.trained.config["settings"], settings, place])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def _measure(self, candidates: Sequence[Candidate], paths: Sequence[Path], rule: MassiveRule | None) -> None:
        """Run the LM over the contexts once, each SAE spliced in by turns."""
        site, text = Site.parse(self.site), self.text
        if rule is not None:
            text, _ = without_massive(text, {self.site: rule})
        keep, documents = torch.from_numpy(text.packed.keep), Documents.of(text.packed)
        document_ST = torch.from_numpy(documents.numbers(range(len(keep))))
        score = SiteScore(
            Splice(text.model, site),
            [self._formed(one) for one in candidates],
            torch.from_numpy(self.store.stats(TRAIN, self.site).mean),
            getattr(torch, self.store.layout.dtype),
            (len(keep), keep.shape[1]),
            documents=documents,
        )
        counters = [TokenL0() for _ in candidates]
        for one, counter in zip(score.scores, counters, strict=True):
            one.observers.append(counter)
        with progress(f"{len(candidates)} SAEs", len(keep), "contexts") as bar:
            for batch in text.batches():
                score.batch(batch.ids_BT, batch.keep_BT, batch.numbers.start)
                bar.update(len(batch.numbers))
        sizes = {"heldout_tokens": int(keep.sum()), "contexts": len(keep), "context": keep.shape[1]}
        sizes["documents"] = score.n_documents()
        sizes["d_model"] = len(score.mean_D)
        for one, counter, path in zip(score.scores, counters, paths, strict=True):
            firing = {name: value for name, value in one.firing.result().items() if name != "fired"} | sizes
            columns = without_empty(score.sums(one).documents)
            _write(path, columns, firing, by_document(torch.cat(counter.l0), keep, document_ST))

    def _formed(self, candidate: Candidate) -> SAE | InferenceForm:
        sae = load(candidate.trained.folder).eval()
        return FORMS[candidate.form](sae, partial(self.batches, candidate.trained))


def by_document(l0_N: Tensor, keep_ST: Tensor, document_ST: Tensor) -> NDArray[np.int32]:
    """Count each document's tokens by their L0, those after a context's first position and those at it.

    Give [2, G, L0 + 1], the documents ascending, without those of which no token is kept.
    """
    known, document_N = np.unique(document_ST[keep_ST].numpy(), return_inverse=True)
    documents, top = len(known), int(l0_N.max()) + 1
    first_N = (keep_ST.nonzero(as_tuple=True)[1] == 0).long()
    place_N = (first_N * documents + torch.from_numpy(document_N)) * top + l0_N
    counts = torch.bincount(place_N, minlength=2 * documents * top)
    return counts.view(2, documents, top).int().numpy()


def _write(path: Path, columns: Columns, firing: Json, counts: NDArray[np.int32]) -> None:
    """Write a whole file or none."""
    parts: dict[str, Any] = {**columns, "firing": np.array(json.dumps(firing)), "counts": counts}
    with atomic_file(path) as file:
        np.savez(file, **parts)


def _read(path: Path) -> tuple[Columns, Json, NDArray[np.int32]]:
    with np.load(path) as parts:
        columns = {name: parts[name] for name in parts.files if name not in ("firing", "counts")}
        return columns, json.loads(str(parts["firing"])), parts["counts"]
