"""`python -m harvest`: what was asked, checked cheapest first; the store it belongs to; then the unit loop."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.base import cli
from data.base.errors import UserError
from data.base.files import format_bytes
from data.base.location import Location, parse_location
from data.base.records import Json, diff_fields
from data.base.settings import whole
from data.base.sites import Site
from data.storage.open import open_storage
from data.store.find import find
from data.store.layout import Layout, choose_layout
from data.store.manifest import HELDOUT, STORE_FORMAT, TRAIN, Manifest, store_settings
from data.store.store import Store
from harvest import lm
from harvest.documents import TextSource, source_from
from harvest.packing import Packing, check_tokenizer, pack
from harvest.units import Unit, covered, finish, plan, summary

DISK_MARGIN = 64 << 20  # records, metadata and what else the file system keeps


@dataclass(frozen=True)
class Request:
    """What was asked for, in the program's own terms; making one refuses whatever can be refused without the model."""

    settings: Json
    model: Json
    source: TextSource
    packing: Packing
    sites: tuple[Site, ...]
    rows: dict[str, int]  # asked of each split; none for a split that is not
    lm_batch: int
    cache: Location
    store: Json
    allow_mixed_devices: bool

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Request:
        """From a resolved configuration."""
        names = cfg["sites"] if isinstance(cfg["sites"], list) else [cfg["sites"]] if cfg["sites"] else []
        sites = tuple(dict.fromkeys(Site.parse(str(name)) for name in names))
        if not sites:
            raise UserError("sites is empty: name at least one, as in sites=[resid_post.3]")
        rows = {TRAIN: whole(cfg, "tokens", 1), HELDOUT: whole(cfg, "heldout_tokens", 0)}
        request = cls(
            settings=store_settings(cfg),
            model=dict(cfg["model"]),
            source=source_from(cfg["text"]),
            packing=Packing.of(cfg["packing"]),
            sites=sites,
            rows={split: count for split, count in rows.items() if count},
            lm_batch=whole(cfg, "lm_batch", 1),
            cache=parse_location(cfg["cache"]),
            store=layout_asked(cfg["store"]),
            allow_mixed_devices=bool(cfg["allow_mixed_devices"]),
        )
        if request.rows.get(HELDOUT) and not request.packing.heldout:
            raise UserError("packing.heldout=0 leaves no held-out text: raise it, or set heldout_tokens=0")
        request.check()
        return request

    def check(self) -> None:
        """Look at the bucket, the text and the model from outside."""
        if not isinstance(self.cache, Path):
            open_storage(self.cache).folders()
        self.source.check()
        lm.check_model(self.model)
        limit = lm.context_limit(self.model)
        if limit is not None and self.packing.context > limit:
            raise UserError(
                f"packing.context={self.packing.context} is longer than the model reads ({limit} tokens): lower it"
            )
        layers = lm.layer_count(self.model)
        for site in self.sites:
            if layers is not None and site.layer is not None and site.layer >= layers:
                raise UserError(f"site {site}: model {self.model['name']} has layers 0 to {layers - 1}, choose one")


def layout_asked(store: Mapping[str, Any]) -> Json:
    """What is asked of the layout, None where nothing is; what else a field may be, `Layout` knows."""
    asked = {field.name: store[field.name] for field in dataclasses.fields(Layout) if field.name != "context"}
    for name, least in {"chunk_rows": 1, "chunks_per_unit": 1, "mixing_seed": 0}.items():
        if asked[name] is not None:
            asked[name] = whole(store, name, least)
    return asked


def identity_of(request: Request, tokenizer: Any) -> Json:
    """Everything but the layout that determines the numbers; reads all of a local text and a local model's files."""
    return {
        "format": STORE_FORMAT,
        "model": lm.identify(request.model),
        "tokenizer": lm.tokenizer_hash(tokenizer),
        "text": request.source.identity(),
        "packing": dataclasses.asdict(request.packing),
        "lm_batch": request.lm_batch,
        "compute_dtype": lm.compute_dtype(request.model),
    }


def existing(request: Request, identity: Json) -> Store | None:
    """The store of these settings, its layout kept unless another is asked for; UserError names what differs in it."""
    asked = {name: value for name, value in request.store.items() if value is not None}
    refused = []
    for store in find(request.cache, request.settings):
        layout = dataclasses.replace(store.layout, **asked)
        fields = diff_fields(store.manifest.identity, {**identity, "layout": layout.json})
        if not fields:
            return store
        refused.append(f"{store.path} has these settings but was made otherwise ({'; '.join(fields)})")
    if refused:
        raise UserError(f"{refused[0]}: ask for the same, delete that folder, or choose another with cache=<folder>")
    return None


def new_manifest(request: Request, identity: Json, d_model: int) -> Manifest:
    """The manifest of a store yet to be made, what is not asked of its layout chosen from the size of the run."""
    defaults = {"dtype": identity["compute_dtype"], "chunk_rows": None, "chunks_per_unit": None, "mixing_seed": 0}
    layout = choose_layout(
        rows=request.rows[TRAIN],
        d_model=d_model,
        n_sites=len(request.sites),
        context=request.packing.context,
        **{**defaults, **{name: value for name, value in request.store.items() if value is not None}},
    )
    identity = {**identity, "layout": layout.json}
    return Manifest(identity, request.settings, lm.short_name(request.model), d_model)


def rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def say(line: str) -> None:
    """Tell the user, once of however many processes."""
    if rank() == 0:
        print(line, flush=True)


def check_disk(request: Request, units: Sequence[Unit], widths: Mapping[str, int], layout: Layout) -> None:
    """Print what the harvest will take; UserError where that is a disk and has not as much (before any codec)."""
    needed = sum(unit.bytes(widths, layout) for unit in units)
    asked = f"{format_bytes(needed)} to write{_spared(units, widths, layout)}"
    if not isinstance(request.cache, Path):
        return say(f"{asked} in {request.cache}")
    folder = request.cache.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    say(f"on disk: {asked}, {format_bytes(free)} free in {request.cache}")
    if needed + DISK_MARGIN > free:
        raise UserError(
            f"the harvest needs {format_bytes(needed)} in {request.cache} and {format_bytes(free)} is free there: free "
            "some space, ask for fewer tokens or sites, or choose another folder with cache=<folder>"
        )


def _spared(units: Sequence[Unit], widths: Mapping[str, int], layout: Layout) -> str:
    """What the size leaves out: what a codec will save, and what int8 would."""
    if layout.encoding is not None:
        return f" as {layout.encoding}{' before its codec' if layout.codec else ''}"
    smaller = dataclasses.replace(layout, encoding="int8")
    needed = sum(unit.bytes(widths, smaller) for unit in units)
    before = f" before store.codec={layout.codec}" if layout.codec else ""
    return f"{before} ({format_bytes(needed)} with store.encoding=int8)"


def harvest(cfg: Mapping[str, Any]) -> Store:
    """Do what a resolved configuration asks, as far as it is not done yet; returns the store."""
    request = Request.of(cfg)
    tokenizer = lm.load_tokenizer(request.model)
    check_tokenizer(tokenizer, request.packing)
    identity = identity_of(request, tokenizer)
    store = existing(request, identity)
    if store and covered(store, request.sites, request.rows):
        finish(store)
        say(f"nothing to do: {store.path} holds all of it ({summary(store)})")
        return store
    from harvest import harvester
    from harvest.hooks import locate

    model = lm.load_model(request.model)
    for site in request.sites:
        locate(model, site)
    manifest = store.manifest if store else new_manifest(request, identity, model.config.get_text_config().hidden_size)
    layout = manifest.layout
    packed = {
        split: pack(request.source, tokenizer, request.packing, split, rows, multiple=layout.contexts_per_unit)
        for split, rows in request.rows.items()
    }
    widths = harvester.widths_of(model, request.sites, packed[TRAIN])
    check_disk(request, plan(store, layout, packed, request.sites), widths, layout)
    store = store or Store.create_or_open(request.cache, manifest)
    units = plan(store, layout, packed, request.sites)
    worker = harvester.Harvester(
        *(store, model, packed, widths, request.lm_batch, lambda token: tokenizer.decode([token])),
        allow_mixed_devices=request.allow_mixed_devices,
        quiet=rank() > 0,
    )
    began = time.monotonic()
    mine = worker.run(units)
    finish(store)
    took, here = time.monotonic() - began, f" ({mine} by this process)" if mine < len(units) else ""
    say(f"harvested {len(units)} units{here} in {took:.0f} s into {store.path} ({summary(store)})")
    return store


def main(config: DictConfig) -> None:
    """The stage, from Hydra's configuration."""
    try:
        harvest(cli.stage_settings(config, "harvest"))
    except KeyboardInterrupt:
        print("stopped; every unit that was committed stays: run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
