"""`python -m evaluate.features.delphi`: the latents of one SAE on held-out text, as Delphi's cache holds them.

Delphi (github.com/EleutherAI/delphi) explains latents by language models and scores the explanations. Its LatentDataset
reads a folder a hook point: `<first>_<last>.safetensors` for each range of latents, with

    locations [n, 3]    context, position, and latent less the range's first, as uint16 where they fit, else uint32
    activations [n]     of the firings, above 0; float32, where Delphi's own cache has float16
    tokens [B, T]       of all contexts

and `config.json`, which names the model for the sake of its tokenizer. Letters: B contexts of T tokens, N kept tokens,
n firings, F latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from data.base.cli import run, stage_settings
from data.base.errors import UserError
from data.base.files import refuse_full, write_atomic
from data.base.location import parse_location
from data.base.progress import progress
from data.base.records import Json
from data.base.sites import Site
from evaluate.config import DelphiSettings

if TYPE_CHECKING:
    from torch import Tensor

    from data.store.store import Store

SMALL = 1 << 16  # what uint16 holds


@dataclass
class LatentFirings:
    """All firings so far: where each is, as (context, position, latent) [n, 3], and its activation [n]."""

    locations: list[NDArray[np.int32]] = field(default_factory=list)
    values: list[NDArray[np.float32]] = field(default_factory=list)

    def update(self, first: int, keep_BT: Tensor, f_NF: Tensor) -> None:
        """Add the contexts number `first` and those after it, whose kept tokens have the activations `f_NF`."""
        rows_n, latents_n = (f_NF > 0).nonzero(as_tuple=True)
        tokens_N2 = keep_BT.nonzero().numpy()
        location_n3 = np.empty((len(rows_n), 3), np.int32)
        location_n3[:, :2] = tokens_N2[rows_n.cpu().numpy()]
        location_n3[:, 0] += first
        location_n3[:, 2] = latents_n.cpu().numpy()
        self.locations.append(location_n3)
        self.values.append(f_NF[rows_n, latents_n].float().cpu().numpy())

    def ranges(self, width: int, splits: int) -> Iterator[tuple[int, int, NDArray[Any], NDArray[np.float32]]]:
        """Give the first and last latent of each range, with the locations and activations in it."""
        location_n3, value_n = np.concatenate(self.locations), np.concatenate(self.values)
        edges = [width * number // splits for number in range(splits + 1)]
        for low, high in pairwise(edges):
            inside = (location_n3[:, 2] >= low) & (location_n3[:, 2] < high)
            own = location_n3[inside] - np.array([0, 0, low], np.int32)
            yield low, high - 1, own.astype(np.uint16 if own.max(initial=0) < SMALL else np.uint32), value_n[inside]


def write_cache(config: Mapping[str, Any]) -> Path:
    """Write the cache of the SAE that a resolved configuration names (evaluate/config.py); the hook point's folder."""
    from safetensors.numpy import save

    from evaluate.features.make import encoded_contexts, one_sae
    from evaluate.inputs import group_by_store, open_text
    from evaluate.massive import ScoredText
    from train.sae.io import load

    settings = DelphiSettings.of(config)
    trained = one_sae(settings.folder)
    out = Path(settings.out) / (settings.hookpoint or trained.site)
    refuse_full(out)
    sae = load(trained.folder).eval()
    if settings.splits > sae.width:
        raise UserError(f"splits={settings.splits} is more than the {sae.width} latents: give fewer")
    ((store, _),) = group_by_store([trained], parse_location(settings.cache))
    text = ScoredText.of(open_text(store, settings.model_dump()), [trained]).text
    firings = LatentFirings()
    with progress(f"latents at {trained.site}", int(text.packed.keep.sum()), "tokens") as bar:
        for first, keep_BT, f_NF in encoded_contexts(sae, text, Site.parse(trained.site)):
            firings.update(first, keep_BT, f_NF)
            bar.update(len(f_NF))
    out.mkdir(parents=True, exist_ok=True)
    tokens_BT = text.packed.contexts.astype(np.int32)
    for low, high, location_n3, value_n in firings.ranges(sae.width, settings.splits):
        content = {"locations": location_n3, "activations": value_n, "tokens": tokens_BT}
        write_atomic(out / f"{low}_{high}.safetensors", save(content))
    write_atomic(out / "config.json", json.dumps(_config(store, tokens_BT, settings), indent=4))
    return out


def _config(store: Store, tokens_BT: NDArray[np.int32], settings: DelphiSettings) -> Json:
    """Return Delphi's CacheConfig, and the model as transformers finds it."""
    from evaluate.inputs import pinned
    from harvest.lm import LanguageModel

    model = LanguageModel.of(pinned(store)["model"])
    text = store.manifest.settings["text"]
    return {
        "dataset_repo": str(text.get("name") or text["kind"]),
        "dataset_split": str(text.get("split") or ""),
        "dataset_name": str(text.get("config") or ""),
        "dataset_column": str(text.get("field") or "text"),
        "batch_size": int(store.manifest.identity["lm_batch"]),
        "cache_ctx_len": tokens_BT.shape[1],
        "ctx_len": tokens_BT.shape[1],
        "n_tokens": tokens_BT.size,
        "n_splits": settings.splits,
        "model_name": model.name if model.path is None else str(model.folder.absolute()),
    }


def main(config: DictConfig) -> None:
    """Run the command on Hydra's configuration."""
    print(f"Delphi's cache: {write_cache(stage_settings(config, 'delphi'))}")


if __name__ == "__main__":
    run(main, "delphi")
