"""What a training run will read and for how long: every check that needs neither the device nor Lightning."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError, did_you_mean
from data.base.location import parse_location
from data.base.records import canonical, diff_fields
from data.base.sites import SITE_KINDS, Site
from data.loading.norm_filter import DecodeRows, NormFilteredReader, median_norm, moments
from data.loading.order import batches_per_epoch, split_calibration
from data.loading.pair import PairReader
from data.loading.reader import Reader, open_reader
from data.store import store as stores
from data.store.find import find, open_store, pick
from data.store.manifest import HELDOUT, TRAIN, store_settings
from data.store.massive import TIMES_MEDIAN, has_massive_rows
from train.config import AUTO, Group, TrainSettings, of_scope

if TYPE_CHECKING:
    from train.sae import SAE


@dataclass(frozen=True)
class Outliers:
    """Rows with a norm above `times` the `median` of the training rows, which are left out everywhere.

    The median is that of the site which is read. Of a transcoder a row is left out as well whose norm at the target is
    above `times` the `target_median`: it would be most of the squared error, whatever the input is there.
    """

    times: float
    median: float
    left_out: dict[str, int]  # rows, by split
    target_median: float | None = None
    by_target: int = 0  # training rows that only the norm at the target leaves out

    def record(self) -> dict[str, Any]:
        """Return what config.json says of them; of an SAE nothing about a target."""
        every = asdict(self)
        if self.target_median is None:
            del every["target_median"], every["by_target"]
        return every


@dataclass(frozen=True)
class DataPlan:
    """Chunk ids are of the split's reader; `steps` are optimizer steps of `batch` rows on each of `world` ranks."""

    store: stores.Store
    site: str
    d_in: int
    batch: int
    world: int
    steps: int
    chunks: NDArray[np.int64]  # of train/: the optimizer's
    reserved: NDArray[np.int64]  # of train/: calibration's, in a seeded order of their own
    heldout: NDArray[np.int64]  # of heldout/: validation's
    stored_chunks: int  # of train/, as the run began: what is harvested later is not this run's
    reserved_rows: int
    readers: dict[str, Reader]  # of train/ and, if there is validation, heldout/; of a transcoder's two sites as one
    outliers: Outliers | None = None
    target: str | None = None  # of a transcoder, and its width
    d_out: int | None = None

    @property
    def tokens(self) -> int:
        """Return the tokens the optimizer sees, repeated passes counted."""
        return self.steps * self.batch * self.world

    def moments(self) -> dict[str, float]:
        """Return E ||x||^2 and the variance of the training rows, less the outliers that are left out."""
        stats, reader = self.store.stats(TRAIN, self.site), self.readers[TRAIN]
        if isinstance(reader, NormFilteredReader):
            return moments(stats, reader.left_out)
        return {"mean_sq_norm": stats.mean_sq_norm, "variance": stats.variance}

    def target_moments(self) -> dict[str, float]:
        """Return those of a transcoder's target."""
        assert self.target is not None
        stats, reader = self.store.stats(TRAIN, self.target), self.readers[TRAIN]
        if isinstance(reader, NormFilteredReader):
            return moments(stats, reader.left_out_second)
        return {"mean_sq_norm": stats.mean_sq_norm, "variance": stats.variance}


def target_of(settings: TrainSettings) -> str | None:
    """Name the site that `target` stands for, None for an SAE; UserError where it stands for none, or for `site`."""
    if settings.target is None:
        return None
    site, name = Site.parse(settings.site), settings.target
    if name in SITE_KINDS:
        if site.layer is None:
            raise UserError(
                f"target={name} is taken at the layer of site, and site={settings.site} names none: give target={name}."
                "<layer>"
            )
        name = f"{name}.{site.layer}"
    target = str(Site.parse(name))
    if target == str(site):
        raise UserError(f"target={settings.target} is the site itself: leave it out for an SAE of {site}")
    return target


def refuse_ranks_in_sweep(settings: TrainSettings) -> None:
    """Refuse ranks that Lightning would start from inside a Hydra sweep, each with the whole sweep."""
    outside = "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ
    if settings.processes > 1 and not outside:
        raise UserError(
            f"trainer.devices={settings.trainer.devices} inside a sweep would start the whole sweep again on every "
            "device: use trainer.devices=1, or start the ranks yourself (torchrun -m train ...)"
        )


def harvest_line(settings: TrainSettings, overrides: Sequence[str], tokens: int) -> str:
    """Write the command that makes what this training asks for:
    its model, text and packing, its site and enough tokens."""
    groups = ("experiment", "model", "text", "packing", "cache", "lm_batch")
    # The overrides a harvest has as well, as the user wrote them; the rest of the line is worked out here.
    own = [item for item in overrides if item.lstrip("+~").split("=")[0].split(".")[0].split("@")[0] in groups]
    target = target_of(settings)
    sites = settings.site if target is None else f"{settings.site},{target}"
    parts = [*own, f"sites=[{sites}]", f"tokens={tokens}", f"heldout_tokens={settings.heldout_tokens}"]
    return f'make harvest ARGS="{" ".join(parts)}"'


def find_store(settings: TrainSettings, overrides: Sequence[str]) -> stores.Store:
    """Find the store named by `store`, else the one in `cache` whose model,
    text and packing are the configured ones."""
    if settings.store:
        return open_store(settings.store, parse_location(settings.cache))
    matches = find(parse_location(settings.cache), store_settings(settings.model_dump()))
    if not matches:
        line = harvest_line(settings, overrides, needed_rows(settings, margin=1.05))
        raise UserError(f"no store in {settings.cache} holds this model, text and packing; make it with: {line}")
    return pick(matches)


def origin(store: stores.Store, site: str, target: str | None = None) -> Group:
    """Return what an SAE's config.json keeps of the activations it is of, a transcoder's with its target;
    `model_name` has no folder of this machine in it."""
    manifest = store.manifest
    sites = {"site": site} if target is None else {"site": site, "target": target}
    names = {**sites, "fingerprint": manifest.fingerprint, "store": manifest.folder}
    made_with = {"model": manifest.settings["model"], "packing": manifest.settings["packing"]}
    return {**names, **made_with, "model_name": manifest.identity["model"]["name"]}


def needed_rows(settings: TrainSettings, margin: float = 1.0) -> int:
    """Count the rows of train/ that one pass of the budget and the calibration need;
    `margin` leaves room for whole chunks."""
    rows: float = settings.tokens / settings.epochs + settings.calibration_tokens
    return math.ceil(rows * margin)


def _fixed_by(store: stores.Store) -> list[str]:
    """Name the overrides that a harvest needs to add to this store, beside its settings."""
    lm_batch = store.manifest.identity.get("lm_batch")
    return [] if lm_batch is None else [f"lm_batch={lm_batch}"]


def _too_few(
    settings: TrainSettings, overrides: Sequence[str], store: stores.Store, why: str, epochs: int | None = None
) -> UserError:
    """Return the error for a store that has not what a training asks for, with the harvest that makes it.

    epochs: how many passes over what there is would be enough, None where no number is.
    """
    rows = needed_rows(settings) + settings.batch * settings.world + store.layout.chunk_rows
    line = harvest_line(settings, [*overrides, *_fixed_by(store)], rows)
    remedy = f"make them with: {line}"
    if settings.store and (fields := diff_fields(store.manifest.settings, store_settings(settings.model_dump()))):
        remedy = (
            f"harvest them with the settings that store was made with (they differ from yours: {'; '.join(fields)})"
        )
    again = f"give epochs={epochs} to read them again, or " if epochs else ""
    return UserError(f"{why} in {store.path}; {again}{remedy}")


def _first_chunks(reader: Reader, rows: int) -> NDArray[np.int64]:
    count = int(np.searchsorted(np.cumsum(reader.sizes), rows)) + 1 if rows else 0
    return np.arange(min(count, len(reader.sizes)))


def _filtered_readers(
    readers: dict[str, Reader],
    settings: TrainSettings,
    times: float,
    chunks: int,
    decode: DecodeRows,
    decode_target: DecodeRows | None,
) -> tuple[dict[str, Reader], Outliers]:
    """Wrap the readers, without the rows above `times` the median norm of the site or of the target; reads every row
    once."""
    median = median_norm(readers[TRAIN], chunks, decode)
    target_median = None if decode_target is None else median_norm(readers[TRAIN], chunks, decode_target)
    # Of train/ alone, for held-out rows too: one limit, or the two splits would be cut differently.
    limit = times * median
    limit_target = math.inf if target_median is None else times * target_median
    filtered: dict[str, NormFilteredReader] = {}
    left_out: dict[str, int] = {}
    for split, reader in readers.items():
        count = chunks if split == TRAIN else len(reader.sizes)
        filtered[split] = NormFilteredReader(
            reader,
            count,
            limit,
            decode,
            decode_second=decode_target,
            limit_second=limit_target,
            threads=settings.loader.threads,
        )
        left_out[split] = filtered[split].left_out.rows
    by_target = filtered[TRAIN].by_second
    return dict(filtered), Outliers(times, median, left_out, target_median, by_target)


def _outlier_times(settings: TrainSettings, store: stores.Store, site: str, target: str | None) -> float | None:
    """Settle the limit of `outliers`: with auto 10 where the commit records show massive rows at the site or the
    target, so that these few rows are not what the variance, the normalisation and the latents are spent on; None where
    every row is read."""
    if settings.outliers != AUTO:
        return settings.outliers
    sites = [site] if target is None else [site, target]
    return TIMES_MEDIAN if any(has_massive_rows(store.stats(TRAIN, name)) for name in sites) else None


def make_plan(
    settings: TrainSettings, overrides: Sequence[str] = (), multirun: bool = False, stored_chunks: int | None = None
) -> DataPlan:
    """Find the store and check that it covers site, tokens and held-out tokens; raises UserError with the remedy.

    `stored_chunks`: take only so many chunks of train/, the first, as a run did that goes on after the store grew.
    """
    if multirun:
        refuse_ranks_in_sweep(settings)
    site, target = str(Site.parse(settings.site)), target_of(settings)
    store = find_store(settings, overrides)
    readers = _readers(settings, overrides, store, site, target)
    # A store may have grown since the run began. With more chunks the order of all rows would be another, so a run that
    # goes on keeps to those it began with.
    stored_chunks = len(readers[TRAIN].sizes[:stored_chunks])
    outliers = None
    times = _outlier_times(settings, store, site, target)
    if times is not None:
        decode, decode_target = _decoders(store, site, target)
        readers, outliers = _filtered_readers(readers, settings, times, stored_chunks, decode, decode_target)
    sizes = readers[TRAIN].sizes[:stored_chunks]
    steps = settings.tokens // (settings.batch * settings.world)
    if steps < 1:
        raise UserError(
            f"tokens={settings.tokens} is less than one step of batch={settings.batch} on {settings.world} ranks: "
            "raise it"
        )
    chunks, reserved = _split(settings, overrides, store, sizes, steps)
    heldout = np.arange(0)
    if HELDOUT in readers:
        heldout = _first_chunks(readers[HELDOUT], settings.heldout_tokens)
        remaining = int(readers[HELDOUT].sizes.sum())
        if outliers and remaining < settings.heldout_tokens:
            need = f"heldout_tokens={settings.heldout_tokens} with outliers={outliers.times:g}"
            why = f"{need} needs more than the {remaining} held-out tokens that are left"
            raise _too_few(settings, overrides, store, why)
    return DataPlan(
        store=store,
        site=site,
        d_in=store.decoder(TRAIN, site).width,
        batch=settings.batch,
        world=settings.world,
        steps=steps,
        chunks=chunks,
        reserved=reserved,
        heldout=heldout,
        stored_chunks=stored_chunks,
        reserved_rows=int(sizes[reserved].sum()),
        readers=readers,
        outliers=outliers,
        target=target,
        d_out=None if target is None else store.decoder(TRAIN, target).width,
    )


def _readers(
    settings: TrainSettings, overrides: Sequence[str], store: stores.Store, site: str, target: str | None
) -> dict[str, Reader]:
    """Open a reader of train/ and, if there is validation, of heldout/, for a transcoder of both its sites;
    UserError where the store lacks a site or rows."""
    sites = store.sites(TRAIN)
    for name in (site, target or site):
        if name not in sites:
            # A name of the right form is a site that is still to be harvested; any other may be a slip.
            near = did_you_mean(name, sites) if Site.parse(name).path is not None else ""
            if near:
                raise UserError(f"site {name} is not in {store.path}: {near} It has {', '.join(sites)}")
            why = f"site {name} is not among the sites ({', '.join(sites) or 'none'})"
            raise _too_few(settings, overrides, store, why)
    readers = {TRAIN: _reader(store, TRAIN, site, target)}
    if settings.heldout_tokens:
        # Before a reader is opened, as the held-out part of a site may not be there at all.
        rows = min(store.rows(HELDOUT, name) for name in (site, target or site))
        if rows >= settings.heldout_tokens:
            readers[HELDOUT] = _reader(store, HELDOUT, site, target)
            rows = int(readers[HELDOUT].sizes.sum())
        if rows < settings.heldout_tokens:
            of = site if target is None else f"{site} with {target}"
            why = f"heldout_tokens={settings.heldout_tokens} asks for more than the {rows} held-out tokens of {of}"
            raise _too_few(settings, overrides, store, why)
    return readers


def _reader(store: stores.Store, split: str, site: str, target: str | None) -> Reader:
    reader = open_reader(store, split, site)
    return reader if target is None else PairReader(reader, open_reader(store, split, target))


def _decoders(store: stores.Store, site: str, target: str | None) -> tuple[DecodeRows, DecodeRows | None]:
    """Give what makes floats of stored rows, of the site and of the target, from rows of both where there are two."""
    if target is None:
        return store.rows_of(site).values, None
    stored = store.row_shape(TRAIN, site)[0]
    own, other = store.rows_of(site), store.rows_of(target)
    # Contiguous, as int8 rows are decoded by views that need it.
    return (
        lambda rows: own.values(np.ascontiguousarray(rows[:, :stored])),
        lambda rows: other.values(np.ascontiguousarray(rows[:, stored:])),
    )


def _split(
    settings: TrainSettings, overrides: Sequence[str], store: stores.Store, sizes: NDArray[np.int64], steps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the chunks for the optimizer and for calibration; UserError where they are too few for so many steps."""
    rows, enough = int(sizes.sum()), None
    if rows > settings.calibration_tokens:
        chunks, reserved = split_calibration(sizes, settings.calibration_tokens, settings.seed)
        # By batches and not by rows: each pass leaves out the last rows that fill none.
        one_pass = batches_per_epoch(int(sizes[chunks].sum()), batch=settings.batch, world=settings.world)
        if one_pass * settings.epochs >= steps:
            return chunks, reserved
        enough = math.ceil(steps / one_pass) if one_pass else None
    need = f"tokens={settings.tokens} with calibration_tokens={settings.calibration_tokens}"
    passes = f"{settings.epochs} pass{'es' * (settings.epochs != 1)} (epochs)"
    why = f"{need} needs more than the {rows} training tokens in {passes}"
    raise _too_few(settings, overrides, store, why, enough)


@dataclass
class TrainRun:
    """One SAE to be trained as `plan` says into `folder`.

    name: tells it from the others of its sweep. step: where its checkpoint stands, 0 for a new one. sweep: the folder
    of the sweep it is of, None where it is trained alone.
    """

    settings: TrainSettings
    plan: DataPlan
    sae: SAE
    folder: Path
    name: str
    step: int = 0
    sweep: Path | None = None

    def stream(self) -> dict[str, Any]:
        """Return what runs of one pass have in common: what is read, in which order, on what, at what pace."""
        store = self.plan.store.path
        read = {
            "store": str(store.resolve() if isinstance(store, Path) else store),
            "site": self.plan.site,
            "target": self.plan.target,
            "tokens": self.plan.tokens,
            "stored_chunks": self.plan.stored_chunks,
        }
        return of_scope(self.settings, "stream", "pass") | read


def group_by_stream(runs: Sequence[TrainRun]) -> list[list[TrainRun]]:
    """Group the runs by the pass over the cache that trains them: of one stream, and less than two checkpoints apart.

    Checkpoints of one pass stand at one step, or one apart where a kill came between their files.
    """
    groups: list[list[TrainRun]] = []
    latest: dict[str, list[TrainRun]] = {}
    for run in sorted(runs, key=lambda run: run.step):
        stream = canonical(run.stream())
        # Those far apart would make the ones behind read again what the others have, while these wait and hold memory.
        if stream not in latest or run.step - latest[stream][-1].step > run.settings.checkpoint_every:
            latest[stream] = []
            groups.append(latest[stream])
        latest[stream].append(run)
    return groups
