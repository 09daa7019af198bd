"""What was asked of a harvest, refused as early as can be; and the store it belongs to, decided by content."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.base.errors import UserError
from data.base.location import Location, parse_location
from data.base.records import Json, diff_fields
from data.storage.open import open_storage
from data.store.find import find
from data.store.layout import choose_layout
from data.store.manifest import HELDOUT, STORE_FORMAT, TRAIN, Manifest, store_settings
from data.store.store import Store
from data.store.token_store import TokenStore, made_for, text_content, tokens_identity
from harvest import lm
from harvest.chat import template_hash
from harvest.config import HarvestSettings
from harvest.packing import added_special_ids


@dataclass(frozen=True)
class HarvestRequest:
    """What was asked for, in the program's own terms; making one refuses whatever can be refused without the model.

    settings: as a store records them. rows: of each split; none for a split that is not.
    """

    asked: HarvestSettings
    settings: Json
    rows: dict[str, int]
    cache: Location

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> HarvestRequest:
        """Read a resolved configuration; UserError in one sentence for the first thing that cannot be."""
        asked = HarvestSettings.of(cfg)
        if not asked.cache.strip():
            raise UserError("cache is empty: name the folder for stores, as in cache=outputs/cache")
        rows = {TRAIN: asked.tokens, HELDOUT: asked.heldout_tokens}
        request = cls(
            asked=asked,
            settings=store_settings(cfg),
            rows={split: count for split, count in rows.items() if count},
            cache=parse_location(asked.cache),
        )
        if request.rows.get(HELDOUT) and not asked.packing.heldout:
            raise UserError("packing.heldout=0 leaves no held-out text: raise it, or set heldout_tokens=0")
        request.check()
        return request

    def check(self) -> None:
        """Look at the bucket, the text and the model from outside."""
        if not isinstance(self.cache, Path):
            open_storage(self.cache).folders()
        self.asked.text.check()
        self.asked.model.check()
        limit, context = self.asked.model.context_limit, self.asked.packing.context
        if limit is not None and context > limit:
            raise UserError(f"packing.context={context} is longer than the model reads ({limit} tokens): lower it")
        layers = self.asked.model.layer_count
        for site in self.asked.sites:
            if layers is not None and site.layer is not None and site.layer >= layers:
                raise UserError(f"site {site}: model {self.asked.model.name} has layers 0 to {layers - 1}, choose one")

    def identity(self, tokenizer: Any, processes: int = 1) -> Json:
        """Return all but the layout that determines the numbers;
        reads all of a local text and a local model's files.

        processes: over how many the model is split (`model.tp_plan`), on which the last bits of a sum depend.
        """
        identity = {
            "format": STORE_FORMAT,
            "model": self.asked.model.identity(),
            "tokenizer": lm.tokenizer_hash(tokenizer),
            "text": self.asked.text.identity(),
            "packing": self.asked.packing.identity(),
            "lm_batch": self.asked.lm_batch,
            "compute_dtype": self.asked.model.compute_dtype,
        }
        if self.asked.text.settings().get("chat") is not None:
            identity["chat_template"] = template_hash(tokenizer)
        if processes > 1:
            identity["tensor_parallel"] = processes
        # Their rows were once stored as ordinary ones: such a store must not be added to.
        if special := added_special_ids(tokenizer):
            identity["special_tokens"] = special
        return identity

    def token_store(self, identity: Json) -> TokenStore:
        """Open the store of this text's tokens in the cache, or make it; all stores of the text have the same."""
        of_tokens = tokens_identity(identity)
        assert of_tokens is not None
        return TokenStore.create_or_open(self.cache, of_tokens, made_for(self.settings, self.asked.model.short_name))

    def existing_store(self, identity: Json) -> Store | None:
        """Find the store of this content, with its own layout unless another is asked for.

        However its text or its model's folder was called when it was made. UserError names what differs in a store of
        the same settings.
        """
        refused = []
        for store in find(self.cache, self.settings):
            fields = self._differences(store, identity)
            if not fields:
                return store
            refused.append(f"{store.path} has these settings but was made otherwise ({'; '.join(fields)})")
        for store in _stores_in(self.cache):
            if not self._differences(store, identity):
                return store
        if refused:
            raise UserError(
                f"{refused[0]}: ask for the same, delete that folder, or choose another with cache=<folder>"
            )
        return None

    def _differences(self, store: Store, identity: Json) -> list[str]:
        """Say what distinguishes a store's content from the one asked for, in words."""
        layout = dataclasses.replace(store.layout, **self.asked.store.chosen)
        return diff_fields(content(store.manifest.identity), content({**identity, "layout": layout.json}))

    def new_manifest(self, identity: Json, d_model: int) -> Manifest:
        """Make the manifest of a store yet to be made,
        what is not asked of its layout chosen from the size of the run."""
        defaults = {"dtype": identity["compute_dtype"], "chunk_rows": None, "chunks_per_unit": None, "mixing_seed": 0}
        layout = choose_layout(
            rows=self.rows[TRAIN],
            d_model=d_model,
            n_sites=len(self.asked.sites),
            context=self.asked.packing.context,
            **{**defaults, **self.asked.store.chosen},
        )
        identity = {**identity, "layout": layout.json}
        return Manifest(identity, self.settings, self.asked.model.short_name, d_model)


def content(identity: Json) -> Json:
    """Take from an identity the names by which the same bytes were reached: paths of a text, a model's folder.

    Over how many processes the model was split is left out as well: like a device, it is in each commit record, and
    `units.refuse_mixed` compares it.
    """
    identity = {name: value for name, value in identity.items() if name != "tensor_parallel"}
    model = dict(identity["model"])
    if model.get("files"):
        model.pop("name", None)
    return {**identity, "model": model, "text": text_content(identity["text"])}


def _stores_in(cache: Location) -> Iterator[Store]:
    """Yield the stores of a cache that can be opened and have an identity to compare."""
    for name in open_storage(cache).folders():
        if open_storage(cache / name).size("manifest.json") is None:
            continue
        try:
            store = Store.open(cache / name)
        except UserError:
            continue  # `find` has reported it where it matters, and it is no store of this content
        if {"model", "text"} <= store.manifest.identity.keys():
            yield store
