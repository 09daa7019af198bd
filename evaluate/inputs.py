"""What an evaluation reads: trained SAEs, the stores they came from, the language model and its held-out text.

Letters: B contexts of a batch, T tokens of a context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from data.base.errors import UserError
from data.base.files import expand_globs
from data.base.location import Location
from data.base.logs import doing
from data.base.records import Json, diff_fields
from data.store.find import find_fingerprint
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import Store
from evaluate.documents import Documents
from harvest import lm
from harvest.chat import template_hash
from harvest.documents import FilesText, TextSource, source_from, split_of, unique
from harvest.packing import PackedTokens, Packing, pack
from harvest.text_source import hash_text
from train.sae.io import load_config
from train.sae.weights_folder import WEIGHTS, folders_below

__all__ = [
    "ContextBatch",
    "HeldoutText",
    "SavedSAE",
    "find_saes",
    "group_by_store",
    "open_text",
    "pinned",
]


@dataclass(frozen=True)
class SavedSAE:
    """A folder of a trained SAE or transcoder and the record in it."""

    folder: Path
    config: Json

    @property
    def site(self) -> str:
        """Return the site that it reads."""
        return str(self.config["site"])

    @property
    def target(self) -> str:
        """Return the site that its output stands for: a transcoder's target, else the site that it reads."""
        return str(self.config.get("target") or self.site)

    @property
    def transcodes(self) -> bool:
        """Return whether it predicts another site than it reads."""
        return self.target != self.site


def find_saes(patterns: str | Sequence[str], setting: str = "saes") -> list[SavedSAE]:
    """List every SAE in or below the folders that match, by path.

    Raises UserError for a pattern without any, naming the setting that gave it.
    """
    names = [patterns] if isinstance(patterns, str) else [str(pattern) for pattern in patterns]
    if not names:
        raise UserError(f"{setting} is empty: name at least one folder, as in {setting}=outputs/train")
    folders: set[Path] = set()
    for name in names:
        try:
            below = {folder for match in expand_globs(name) for folder in folders_below(Path(match))}
        except (OSError, ValueError) as error:  # a name too long, or with a null character
            raise UserError(f"{setting}={name[:80]} cannot be read ({error.args[-1]}): fix the path") from None
        if not below:
            raise UserError(
                f"{setting}={name} holds no trained SAE (no {WEIGHTS} in or below it): train one, or fix the path"
            )
        folders |= below
    return [SavedSAE(folder, load_config(folder)) for folder in sorted(folders)]


def group_by_store(saes: Iterable[SavedSAE], cache: Location) -> list[tuple[Store, dict[str, list[SavedSAE]]]]:
    """Group SAEs by store and, within it, by the site that their output stands for, so that the transcoders into a
    site stand beside its SAEs.

    Raises UserError where the cache lacks the store, or that a site.
    """
    stores: dict[str, Store] = {}
    by_store: dict[str, dict[str, list[SavedSAE]]] = {}
    for sae in saes:
        fingerprint, site = sae.config.get("fingerprint"), sae.config.get("site")
        if not isinstance(fingerprint, str) or not isinstance(site, str):
            raise UserError(f"{sae.folder} does not say which store and site it was trained on: train it again")
        if fingerprint not in stores:
            stores[fingerprint] = find_fingerprint(cache, fingerprint)
        for name in (sae.site, sae.target):
            stores[fingerprint].stats(TRAIN, name)
        by_store.setdefault(fingerprint, {}).setdefault(sae.target, []).append(sae)
    return [(stores[fingerprint], sites) for fingerprint, sites in by_store.items()]


@dataclass(frozen=True)
class ContextBatch:
    """Contexts that the language model reads at once, on its device.

    numbers: which contexts they are. keep_BT: the tokens that are scored; the others (BOS and their like) are not.
    """

    numbers: range
    ids_BT: Int64[Tensor, "B T"]
    keep_BT: Bool[Tensor, "B T"]


@dataclass(frozen=True)
class HeldoutText:
    """Text that no SAE was trained on, packed into contexts, and the language model that reads it.

    lm_batch: contexts the model reads at once. own: what a report says of the text where it is the user's own.
    """

    model: Any
    packed: PackedTokens
    tokenizer: Any
    lm_batch: int
    own: Json = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Return the device that the model takes its input on."""
        return lm.input_device(self.model)

    @property
    def documents(self) -> Documents:
        """Return which document each token belongs to."""
        return Documents.of(self.packed)

    def batches(self, contexts: range | None = None) -> Iterator[ContextBatch]:
        """Give the contexts (all of them, or those numbered) in order, `lm_batch` at a time."""
        chosen = range(len(self.packed.contexts)) if contexts is None else contexts
        for first in range(chosen.start, chosen.stop, self.lm_batch):
            numbers = range(first, min(first + self.lm_batch, chosen.stop))
            part = slice(numbers.start, numbers.stop)
            ids_BT = torch.from_numpy(self.packed.contexts[part]).to(self.device, torch.int64)
            keep_BT = torch.from_numpy(self.packed.keep[part]).to(self.device)
            yield ContextBatch(numbers, ids_BT, keep_BT)


def pinned(store: Store) -> Json:
    """Pin the settings that a store was harvested with, what was then new on the hub replaced by its commit."""
    settings, identity = store.manifest.settings, store.manifest.identity
    model, text = dict(settings["model"]), dict(settings["text"])
    if identity["model"].get("commit"):
        model["revision"] = identity["model"]["commit"]
    if "revision" in identity["text"]:
        text["revision"] = identity["text"]["revision"]
    return {**settings, "model": model, "text": text}


def open_text(store: Store, config: Mapping[str, Any]) -> HeldoutText:
    """Open the language model of `store` and the held-out text, both checked to be the store's; cheap checks first.

    `config` holds `tokens`, `device`, `device_map` and, where they are not the defaults, `tp_plan`, `lm_batch` and
    `text` (the user's own held-out text; evaluate/config.py). Raises UserError where model, tokenizer or text are not
    the store's, where the text is too short, and where a document of the user's own text was in the training split.
    """
    settings, identity = pinned(store), store.manifest.identity
    model_settings = {**settings["model"], "device": config["device"], "device_map": config["device_map"]}
    model_settings["tp_plan"] = config.get("tp_plan")
    packing, source = Packing.of(settings["packing"]), source_from(settings["text"])
    own_settings = config.get("text") or {}
    own_source = FilesText(**own_settings) if own_settings.get("paths") else None
    if own_source is None and not packing.heldout:
        raise UserError(
            f"{store.path} was made with packing.heldout=0, so no text is held out: harvest with a share of it, "
            "or give text of your own with text.paths=[...]"
        )
    doing(f"checking that model and text are those of {store.path.name}")
    source.check()
    if own_source is not None:
        _check_own(own_source)
    lm.check_model(model_settings)
    tokenizer = _check_identity(store, model_settings, source)
    doing(f"tokenising {config['tokens']:,} held-out tokens")
    try:
        if own_source is None:
            packed = pack(source, tokenizer, packing, HELDOUT, config["tokens"])
        else:
            packed = _pack_own(source, own_source, tokenizer, packing, config["tokens"])
    except UserError as error:
        raise UserError(f"tokens={config['tokens']:,} cannot be scored: {error}") from None
    own = {} if own_source is None else own_source.identity()
    doing(f"loading {store.manifest.name}")
    lm_batch = config.get("lm_batch") or identity["lm_batch"]
    return HeldoutText(lm.load_model(model_settings), packed, tokenizer, lm_batch, own)


def _check_own(own: TextSource) -> None:
    try:
        own.check()
    except (OSError, ValueError) as error:  # a name too long, or with a null character
        raise UserError(f"text.paths cannot be read ({error}): name files of text") from None


def _check_identity(store: Store, model_settings: Json, source: TextSource) -> Any:
    """Compare model, tokenizer and text of today with the store's record; the tokenizer, or UserError."""
    identity = store.manifest.identity
    today: Json = {"model": lm.identify(model_settings), "text": source.identity()}
    tokenizer = lm.load_tokenizer(model_settings)
    today["tokenizer"] = lm.tokenizer_hash(tokenizer)
    if "chat_template" in identity:
        today["chat_template"] = template_hash(tokenizer)
    fields = diff_fields({name: identity[name] for name in today}, today)
    if fields:
        changes = "; ".join(line.replace(" here,", " in the store,").replace(" asked", " now") for line in fields)
        raise UserError(
            f"{store.path} was made from something else ({changes}): restore it, or harvest and train again"
        )
    return tokenizer


def _pack_own(source: TextSource, own: TextSource, tokenizer: Any, packing: Packing, tokens: int) -> PackedTokens:
    """Pack the user's own text, all of it held out; UserError where one of its documents was in the training split."""
    names = {hash_text(document.text): document.name for document in unique(own.documents())}
    trained_on = [
        names[hash_text(document.text)]
        for document in unique(source.documents())
        if split_of(document.key, packing.heldout) == TRAIN and hash_text(document.text) in names
    ]
    if trained_on:
        raise UserError(
            f"{len(trained_on)} of {len(names)} documents of text.paths, such as {trained_on[0]}, are in the text that "
            "the SAEs were trained on: take them out"
        )
    # With nothing held out every document of the text is of the split `train`, which is then all there is.
    return pack(own, tokenizer, packing.model_copy(update={"heldout": 0.0}), TRAIN, tokens)
