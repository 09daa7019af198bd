"""`python -m harvest`: what was asked, checked cheapest first; the store it belongs to; then the unit loop."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from data.base import cli
from data.base.calls import settings_of_call
from data.base.cpu import has_amx
from data.base.errors import UserError
from data.base.files import format_bytes
from data.base.logs import doing
from data.base.records import Json
from data.slurm.settings import output_folder, slurm_launcher
from data.store.layout import Layout
from data.store.store import Store
from harvest import lm
from harvest.model_ranks import ModelRanks, join_ranks
from harvest.packing import PackedTokens, check_tokenizer
from harvest.request import HarvestRequest
from harvest.slurm import harvest_by_jobs
from harvest.stored_text import StoredText
from harvest.summary import advice, summary
from harvest.text_source import token_ids
from harvest.tokenise import Tokeniser
from harvest.tokenizer import TokenIds
from harvest.units import Unit, covered, finish, plan

if TYPE_CHECKING:
    from harvest.harvester import Harvester

DISK_MARGIN = 64 << 20  # records, metadata and what else the file system keeps


def rank() -> int:
    """Return this process's number among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def say(line: str) -> None:
    """Tell the user, once of however many processes."""
    if rank() == 0:
        print(line, flush=True)


def check_disk(request: HarvestRequest, units: Sequence[Unit], widths: Mapping[str, int], layout: Layout) -> None:
    """Print what the harvest will take; UserError where that is a disk and has not as much (before any codec)."""
    needed = sum(unit.bytes(widths, layout) for unit in units)
    asked = f"{format_bytes(needed)} to write{_spared(units, widths, layout)}"
    if not isinstance(request.cache, Path):
        return say(f"{asked} in {request.cache}")
    say(f"on disk: {asked}, {format_bytes(free_on_disk(request.cache))} free in {request.cache}")
    refuse_full_disk(request.cache, needed)


def check_disk_early(request: HarvestRequest, store: Store | None, widths: Mapping[str, int], layout: Layout) -> None:
    """Raise UserError where a disk cannot even have the rows asked for, which is known before text is tokenised."""
    if isinstance(request.cache, Path):
        needed = 0
        for split, rows in request.rows.items():
            for site, width in widths.items():
                there = store.rows(split, site) if store is not None and site in store.sites(split) else 0
                needed += max(0, rows - there) * layout.row_bytes(width)
        refuse_full_disk(request.cache, needed)


def free_on_disk(folder: Path) -> int:
    """Return what is free on the disk of a folder, which need not be there yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def refuse_full_disk(cache: Path, needed: int) -> None:
    """Raise UserError where a disk has not as much as a harvest needs."""
    free = free_on_disk(cache)
    if needed + DISK_MARGIN > free:
        raise UserError(
            f"the harvest needs {format_bytes(needed)} in {cache} and {format_bytes(free)} is free there: free "
            "some space, ask for fewer tokens or sites, or choose another folder with cache=<folder>"
        )


def _spared(units: Sequence[Unit], widths: Mapping[str, int], layout: Layout) -> str:
    """Say what the size leaves out: what a codec will save, and what int8 would."""
    if layout.encoding is not None:
        return f" as {layout.encoding}{' before its codec' if layout.codec else ''}"
    smaller = dataclasses.replace(layout, encoding="int8")
    needed = sum(unit.bytes(widths, smaller) for unit in units)
    before = f" before store.codec={layout.codec}" if layout.codec else ""
    return f"{before} ({format_bytes(needed)} with store.encoding=int8)"


def check_text(request: HarvestRequest, tokenizer: Any) -> None:
    """Raise UserError where a model without a tokenizer is given text, seen at the first document."""
    if isinstance(tokenizer, TokenIds):
        first = next(iter(request.asked.text.documents()), None)
        if first is not None and first.text and token_ids(first.text) is None:
            tokenizer([first.text])


def packed_splits(
    request: HarvestRequest, identity: Json, tokenizer: Any, model: Any, layout: Layout
) -> dict[str, StoredText]:
    """Return the contexts of each split, each token one that the model's embedding has; tokenises what is not yet."""
    tokeniser = Tokeniser(
        request.token_store(identity),
        request.asked.text,
        tokenizer,
        request.asked.packing,
        documents=identity["text"].get("documents"),
        quiet=rank() > 0,
    )
    vocabulary = len(model.get_input_embeddings().weight)
    return {
        split: tokeniser.text(split, rows, multiple=layout.contexts_per_unit, vocabulary=vocabulary)
        for split, rows in request.rows.items()
    }


def faster(model: Any) -> Iterator[str]:
    """Say where another dtype would be faster: nothing is chosen by machine, for the store would be another one."""
    import torch

    if model.dtype == torch.float32 and model.device.type == "cpu" and has_amx():
        yield "this CPU has AMX: with model.dtype=bfloat16 a larger model harvests up to 4 times as fast"


def harvest(config: Mapping[str, Any] | None = None, **settings: Any) -> Store:
    """Harvest what is asked for, as far as it is not done yet; returns the store.

    `settings` are those of conf/harvest.yaml, groups by an option's name or as a mapping, dotted names by
    `**{"packing.context": 128}`; or `config` is a whole configuration, as Hydra composes one. Raises UserError in one
    sentence for what cannot be.
    """
    request = HarvestRequest.from_config(settings_of_call("harvest", config, settings))
    with join_ranks(request.asked.model.settings.tp_plan) as ranks:
        return _harvest(request, ranks)


def agreed_store(ranks: ModelRanks, choose: Callable[[], Store | None]) -> Store | None:
    """Return the store that the first of the processes finds or makes, or None, in all of them."""
    chosen: list[Store | None] = []

    def location() -> Any:
        chosen.append(choose())
        return None if chosen[0] is None else chosen[0].path

    path = ranks.agree(location)
    if chosen:
        return chosen[0]
    return None if path is None else Store.open(path)


def _harvest(request: HarvestRequest, ranks: ModelRanks) -> Store:
    """Harvest what is asked for, by this process or by all that run the model together."""
    asked = request.asked
    doing(f"checking {asked.model.name} and hashing the {asked.text.kind} text")
    tokenizer = lm.load_tokenizer(asked.model)
    check_tokenizer(tokenizer, asked.packing)
    check_text(request, tokenizer)
    identity = ranks.agree(lambda: request.identity(tokenizer, ranks.size))
    store = agreed_store(ranks, lambda: request.existing_store(identity))
    if store and ranks.agree(lambda: covered(store, asked.sites, request.rows)):
        if ranks.leads:
            finish(store)
        say(f"nothing to do: {store.path} holds all of it ({summary(store)})")
        say_all(advice(store, asked.sites))
        return store
    from harvest import harvester
    from harvest.hooks import locate

    doing(f"loading {asked.model.name}")
    model = lm.load_model(asked.model)
    for site in asked.sites:
        locate(model, site)
    d_model = model.config.get_text_config().hidden_size
    manifest = store.manifest if store else request.new_manifest(identity, d_model)
    # Widths are the same whatever is read.
    blank = np.zeros((1, asked.packing.context), np.int32)
    widths = harvester.widths_of(model, asked.sites, PackedTokens(blank, blank == 0), ranks)
    ranks.agree(lambda: check_disk_early(request, store, widths, manifest.layout))
    doing(f"preparing {sum(request.rows.values()):,} tokens of text")
    packed = packed_splits(request, identity, tokenizer, model, manifest.layout)

    def begin() -> Store:
        check_disk(request, plan(store, manifest.layout, packed, asked.sites), widths, manifest.layout)
        return store or Store.create_or_open(request.cache, manifest)

    begun = agreed_store(ranks, begin)
    assert begun is not None
    say_all(faster(model))
    worker = harvester.Harvester(
        begun,
        model,
        packed,
        widths,
        asked.lm_batch,
        lambda token: tokenizer.decode([token]),
        allow_mixed_devices=asked.allow_mixed_devices,
        quiet=rank() > 0,
        ranks=ranks,
    )
    if ranks.leads:
        _run(worker, plan(begun, manifest.layout, packed, asked.sites))
    else:
        worker.follow()
    for text in packed.values():
        if text.lost is not None:
            raise UserError(f"{text.lost}; what was read until then is harvested")
    say_all(advice(begun, asked.sites))
    return begun


def _run(worker: Harvester, units: Sequence[Unit]) -> None:
    """Run the units that are left, and say what was done."""
    store, began = worker.store, time.monotonic()
    mine = worker.run(units)
    finish(store)
    took, here = time.monotonic() - began, f" ({mine} by this process)" if mine < len(units) else ""
    say(f"harvested {len(units)} units{here} in {took:.0f} s into {store.path} ({summary(store)})")


def say_all(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def main(config: DictConfig) -> None:
    """Run the stage from Hydra's configuration."""
    settings, slurm = cli.stage_settings(config, "harvest"), slurm_launcher()
    try:
        if slurm is None:
            harvest(settings)
        else:
            harvest_by_jobs(settings, slurm, output_folder().parent / "slurm", harvest)
    except KeyboardInterrupt:
        print("stopped; every unit that was committed stays: run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
