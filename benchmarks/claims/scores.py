"""The figures behind the claims: each SAE of a site, in each form a claim asks for, over the same held-out contexts.

Letters: S sequences of the set, T tokens of a context, N kept tokens, F latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.claims.forms import BatchForm, rescaled, turned, with_threshold
from benchmarks.claims.verdict import Estimate
from data.base.files import atomic_file
from data.base.records import Json, canonical
from data.base.sites import Site
from data.loading.loader import ActivationLoader
from data.loading.order import split_calibration
from data.loading.reader import open_reader
from data.store.manifest import TRAIN
from data.store.store import Store
from evaluate.metrics import Columns, resampled, statistics, totals
from evaluate.run import SavedSAE, Text, open_text
from evaluate.score import SiteScore
from evaluate.splice import Splice
from train.sae.base import SAE
from train.sae.config import RETIRED
from train.sae.io import VARIANTS, WEIGHTS, load
from train.sae.variants.topk import TopK

FORMAT = 1  # of a score's file
INFERENCE, BATCH, THRESHOLD, PER_TOKEN, RESCALED = "inference", "batch", "threshold", "per token", "rescaled"

_OF_GRID = ("d_in", "width", "k", "target_l0", "sparsity")

Batches = Callable[[], Sequence[Tensor]]

FORMS: dict[str, Callable[[SAE, Batches], SAE]] = {
    INFERENCE: lambda sae, batches: sae,
    BATCH: lambda sae, batches: turned(sae, BatchForm),
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

    counts: [2, S, L0 + 1], each sequence's tokens by their L0, those after its first position and those at it.
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
        """One of `evaluate.metrics.statistics`."""
        return Estimate(float(self._all[name][0]), self._drawn[name])

    def target(self) -> str:
        """Give the L0 it was trained for, or its coefficient where there was none."""
        k = self.settings["k"]
        return f"k={k:g}" if k is not None else f"sparsity={self.settings['sparsity']:g}"

    @cached_property
    def options(self) -> Json:
        """The settings that are not the variant's defaults, beside width and sparsity."""
        return options({"variant": self.variant, "settings": self.settings})


def options(config: Json) -> Json:
    """The settings of an SAE's record that are not its variant's defaults, beside width and sparsity."""
    fields = VARIANTS[config["variant"]].Config.model_fields
    defaults = RETIRED | {name: field.default for name, field in fields.items()}
    given = {name: value for name, value in config["settings"].items() if name not in _OF_GRID}
    return {name: value for name, value in given.items() if value != defaults.get(name)}


class _Counting:
    """An SAE that records the L0 of each token it reads."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.l0: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sae, name)

    def encode_decode(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        f_NF, x_hat_ND = self.sae.encode_decode(x_ND)
        self.l0.append((f_NF > 0).sum(1).cpu())
        return f_NF, x_hat_ND


class ScoredSite:
    """One site of one store: its held-out text, and training rows that no optimizer saw."""

    def __init__(self, store: Store, site: str, settings: Mapping[str, Any]) -> None:
        self.store, self.site, self.settings = store, site, settings
        self._batches: dict[tuple[int, int], list[Tensor]] = {}

    @property
    def special(self) -> bool:
        """Whether the rows of special tokens are among those stored and scored."""
        return bool(self.store.manifest.settings["packing"]["keep_special"])

    @cached_property
    def text(self) -> Text:
        """The LM and the held-out contexts; opened when first needed, as scores that exist need neither."""
        return open_text(self.store, self.settings)

    def batches(self, trained: SavedSAE) -> Sequence[Tensor]:
        """Calibration rows in batches as the SAE was trained in, in model units."""
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
        paths = [folder / f"{self._key(one)}.npz" for one in candidates]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            self._measure([candidates[i] for i in missing], [paths[i] for i in missing])
        draws = {"samples": self.settings["bootstrap"], "seed": self.settings["seed"], "special": self.special}
        return [Scored(one, *_read(path), **draws) for one, path in zip(candidates, paths, strict=True)]

    def _key(self, candidate: Candidate) -> str:
        """Hash what a score depends on."""
        weights = hashlib.sha256((candidate.trained.folder / WEIGHTS).read_bytes()).hexdigest()
        settings = {name: self.settings[name] for name in ("tokens", "lm_batch", "calibration_tokens")}
        place = [self.store.manifest.fingerprint, self.site]
        form = "shipped" if candidate.form == INFERENCE else candidate.form  # the inference form's name in older scores
        parts = canonical([FORMAT, weights, form, candidate.trained.config["settings"], settings, place])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def _measure(self, candidates: Sequence[Candidate], paths: Sequence[Path]) -> None:
        """Run the LM over the contexts once, each SAE spliced in by turns."""
        from tqdm import tqdm

        packed, model = self.text.packed, self.text.model
        saes = [_Counting(self._formed(one)) for one in candidates]
        contexts, keep = torch.from_numpy(packed.contexts).long(), torch.from_numpy(packed.keep)
        score = SiteScore(
            Splice(model, Site.parse(self.site)),
            cast(Sequence[SAE], saes),
            torch.from_numpy(self.store.stats(TRAIN, self.site).mean),
            getattr(torch, self.store.layout.dtype),
            (len(contexts), contexts.shape[1]),
        )
        size = self.settings["lm_batch"] or self.store.manifest.identity["lm_batch"]
        device = next(model.parameters()).device
        for first in tqdm(range(0, len(contexts), size), desc=f"{len(candidates)} SAEs", unit="batch", mininterval=5.0):
            ids_BT, keep_BT = contexts[first : first + size].to(device), keep[first : first + size].to(device)
            score.batch(ids_BT, keep_BT, first)
        sizes = {"heldout_tokens": int(keep.sum()), "sequences": len(keep), "context": keep.shape[1]}
        sizes["d_model"] = saes[0].sae.d_in
        for one, sae, path in zip(score.scores, saes, paths, strict=True):
            firing = {name: value for name, value in one.firing.result().items() if name != "fired"} | sizes
            _write(path, score.columns(one), firing, by_sequence(torch.cat(sae.l0), keep))

    def _formed(self, candidate: Candidate) -> SAE:
        sae = load(candidate.trained.folder).eval()
        return FORMS[candidate.form](sae, partial(self.batches, candidate.trained))


def by_sequence(l0_N: Tensor, keep_ST: Tensor) -> NDArray[np.int32]:
    """Tokens of each sequence by their L0, those after its first position and those at it: [2, S, L0 + 1]."""
    sequence_N, position_N = keep_ST.nonzero(as_tuple=True)
    top, first_N = int(l0_N.max()) + 1, (position_N == 0).long()
    place_N = (first_N * len(keep_ST) + sequence_N) * top + l0_N
    counts = torch.bincount(place_N, minlength=2 * len(keep_ST) * top)
    return counts.view(2, len(keep_ST), top).int().numpy()


def _write(path: Path, columns: Columns, firing: Json, counts: NDArray[np.int32]) -> None:
    """Write a whole file or none."""
    parts: dict[str, Any] = {**columns, "firing": np.array(json.dumps(firing)), "counts": counts}
    with atomic_file(path) as file:
        np.savez(file, **parts)


def _read(path: Path) -> tuple[Columns, Json, NDArray[np.int32]]:
    with np.load(path) as parts:
        columns = {name: parts[name] for name in parts.files if name not in ("firing", "counts")}
        return columns, json.loads(str(parts["firing"])), parts["counts"]
