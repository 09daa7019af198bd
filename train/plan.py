"""What a training run will read and for how long: every check that needs neither the device nor Lightning."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError, did_you_mean
from data.base.location import parse_location
from data.base.records import canonical, diff_fields
from data.base.sites import SITE_KINDS, Site
from data.loading.norm_filter import DecodeRows, NormFilteredReader, NormLimit, median_norm, moments
from data.loading.order import batches_per_epoch, split_calibration
from data.loading.reader import Reader
from data.store import store as stores
from data.store.find import find, open_store, pick
from data.store.manifest import HELDOUT, TRAIN, store_settings
from data.store.massive import TIMES_MEDIAN, has_massive_rows
from train.config import AUTO, Group, TrainSettings, of_scope
from train.sites import StoredSite, joined_name, joined_reader, require_joinable

if TYPE_CHECKING:
    from train.sae import SAE


@dataclass(frozen=True)
class Outliers:
    """Rows with a norm above `times` the `median` of the training rows, which are left out everywhere.

    The median is that of the site which is read. Of a transcoder a row is left out as well whose norm at the target is
    above `times` the `target_median`: it would be most of the squared error, whatever the input is there. Of a
    crosscoder a row is left out whose norm is above `times` the median at one of its sites.
    """

    times: float
    median: float
    left_out: dict[str, int]  # rows, by split
    target_median: float | None = None
    by_target: int = 0  # training rows that only the norm at the target leaves out
    medians: tuple[float, ...] = ()  # of a crosscoder's sites, in order

    def record(self) -> dict[str, Any]:
        """Return what config.json says of them; of an SAE nothing about a target or other sites."""
        every = asdict(self) | {"medians": [*self.medians]}
        if self.target_median is None:
            del every["target_median"], every["by_target"]
        if not self.medians:
            del every["medians"]
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
    readers: dict[str, Reader]  # of train/ and, if there is validation, heldout/; of several sites as one
    outliers: Outliers | None = None
    target: str | None = None  # of a transcoder, and its width
    d_out: int | None = None
    joined: tuple[StoredSite, ...] = ()  # of a crosscoder, whose `site` names them all and whose `store` is the first's

    @property
    def site_width(self) -> int:
        """Return the width that `expansion` multiplies: the site's, or the widest one's of a crosscoder."""
        return max(self.site_widths or [self.d_in])

    @property
    def site_widths(self) -> list[int] | None:
        """Return the widths of a crosscoder's sites, None for one site."""
        return [site.width for site in self.joined] or None

    @property
    def tokens(self) -> int:
        """Return the tokens the optimizer sees, repeated passes counted."""
        return self.steps * self.batch * self.world

    def moments(self) -> dict[str, float | list[float]]:
        """Return E ||x||^2 and the variance of the training rows, less the outliers that are left out; of a crosscoder
        those of each site."""
        if self.joined:
            every = [self._moments(site, place) for place, site in enumerate(self.joined)]
            return {name: [each[name] for each in every] for name in every[0]}
        return {**self._moments(StoredSite(self.store, self.site), 0)}

    def mean_share(self) -> float:
        """Compute the share of E ||x||^2 that the mean holds, of a crosscoder the largest over its sites."""
        squares, variances = np.atleast_1d(*self.moments().values())
        return float((1 - variances / squares).max())

    def target_moments(self) -> dict[str, float]:
        """Return those of a transcoder's target."""
        assert self.target is not None
        return self._moments(StoredSite(self.store, self.target), 1)

    def _moments(self, site: StoredSite, place: int) -> dict[str, float]:
        stats, reader = site.store.stats(TRAIN, site.name), self.readers[TRAIN]
        if isinstance(reader, NormFilteredReader):
            return moments(stats, reader.left_out[place])
        return {"mean_sq_norm": stats.mean_sq_norm, "variance": stats.variance}


def target_of(settings: TrainSettings) -> str | None:
    """Name the site that `target` stands for, None for an SAE; UserError where it stands for none, or for `site`."""
    if settings.target is None:
        return None
    assert isinstance(settings.site, str), "a crosscoder has no target"
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
    named = settings.site if isinstance(settings.site, list) else [settings.site]
    sites = ",".join(named if target is None else [*named, target])
    parts = [*own, f"sites=[{sites}]", f"tokens={tokens}", f"heldout_tokens={settings.heldout_tokens}"]
    return f'make harvest ARGS="{" ".join(parts)}"'


def find_stores(settings: TrainSettings, overrides: Sequence[str]) -> list[stores.Store]:
    """Find the stores named by `store`, else the one in `cache` whose model, text and packing are the configured ones;
    UserError where rows of several do not stand for the same tokens."""
    if settings.store:
        names = settings.store if isinstance(settings.store, list) else [settings.store]
        opened = [open_store(name, parse_location(settings.cache)) for name in names]
        require_joinable(opened, [TRAIN, HELDOUT] if settings.heldout_tokens else [TRAIN])
        return opened
    matches = find(parse_location(settings.cache), store_settings(settings.model_dump()))
    if not matches:
        line = harvest_line(settings, overrides, needed_rows(settings, margin=1.05))
        raise UserError(f"no store in {settings.cache} holds this model, text and packing; make it with: {line}")
    return [pick(matches)]


def origin(store: stores.Store, site: str, target: str | None = None, joined: Sequence[StoredSite] = ()) -> Group:
    """Return what an SAE's config.json keeps of the activations it is of, a transcoder's with its target, a
    crosscoder's with all its sites; `model_name` has no folder of this machine in it."""
    manifest = store.manifest
    sites: Group = {"site": site} if target is None else {"site": site, "target": target}
    if joined:
        sites = {"sites": [each.record() for each in joined]}
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
    sites: Sequence[StoredSite],
    joined: bool,
) -> tuple[dict[str, Reader], Outliers]:
    """Wrap the readers, without the rows above `times` the median norm of one of the sites; reads every row once.

    sites: those of a crosscoder where `joined`, else the one that is read, before a transcoder's target.
    """
    decoders = _decoders(sites)
    medians = [median_norm(readers[TRAIN], chunks, decode) for decode in decoders]
    # Of train/ alone, for held-out rows too: one limit, or the two splits would be cut differently.
    limits = [NormLimit(decode, times * median) for decode, median in zip(decoders, medians, strict=True)]
    filtered: dict[str, NormFilteredReader] = {}
    left_out: dict[str, int] = {}
    for split, reader in readers.items():
        count = chunks if split == TRAIN else len(reader.sizes)
        filtered[split] = NormFilteredReader(reader, count, *limits, threads=settings.loader.threads)
        left_out[split] = filtered[split].left_out[0].rows
    if joined:
        return dict(filtered), Outliers(times, medians[0], left_out, medians=tuple(medians))
    target_median = medians[1] if len(medians) > 1 else None
    return dict(filtered), Outliers(times, medians[0], left_out, target_median, filtered[TRAIN].by_others)


def _outlier_times(settings: TrainSettings, sites: Sequence[StoredSite]) -> float | None:
    """Settle the limit of `outliers`: with auto 10 where the commit records show massive rows at one of the sites, so
    that these few rows are not what the variance, the normalisation and the latents are spent on; None where every row
    is read."""
    if settings.outliers != AUTO:
        return settings.outliers
    massive = [has_massive_rows(site.store.stats(TRAIN, site.name)) for site in sites]
    return TIMES_MEDIAN if any(massive) else None


def make_plan(
    settings: TrainSettings, overrides: Sequence[str] = (), multirun: bool = False, stored_chunks: int | None = None
) -> DataPlan:
    """Find the store and check that it covers site, tokens and held-out tokens; raises UserError with the remedy.

    `stored_chunks`: take only so many chunks of train/, the first, as a run did that goes on after the store grew.
    """
    if multirun:
        refuse_ranks_in_sweep(settings)
    target = target_of(settings)
    sites = _sites(settings, find_stores(settings, overrides))
    store, site = sites[0].store, joined_name(sites)
    joined = tuple(sites) if settings.crosses else ()
    every = sites if target is None else [*sites, StoredSite(store, target)]
    readers = _readers(settings, overrides, every)
    # A store may have grown since the run began. With more chunks the order of all rows would be another, so a run that
    # goes on keeps to those it began with.
    stored_chunks = len(readers[TRAIN].sizes[:stored_chunks])
    outliers = None
    times = _outlier_times(settings, every)
    if times is not None:
        readers, outliers = _filtered_readers(readers, settings, times, stored_chunks, every, settings.crosses)
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
        d_in=sum(each.width for each in sites),
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
        joined=joined,
    )


def _sites(settings: TrainSettings, opened: Sequence[stores.Store]) -> list[StoredSite]:
    """List every site of `site` in every store; UserError where two names are of one site."""
    given = settings.site if isinstance(settings.site, list) else [settings.site]
    names = [str(Site.parse(name)) for name in given]
    if len(set(names)) < len(names):
        raise UserError(f"site=[{','.join(given)}] names one site twice: give each once")
    return [StoredSite(store, name) for store in opened for name in names]


def _readers(settings: TrainSettings, overrides: Sequence[str], sites: Sequence[StoredSite]) -> dict[str, Reader]:
    """Open a reader of train/ and, if there is validation, of heldout/, of all the sites as one;
    UserError where a store lacks a site or rows."""
    for store, name in ((site.store, site.name) for site in sites):
        present = store.sites(TRAIN)
        if name not in present:
            # A name of the right form is a site that is still to be harvested; any other may be a slip.
            near = did_you_mean(name, present) if Site.parse(name).path is not None else ""
            if near:
                raise UserError(f"site {name} is not in {store.path}: {near} It has {', '.join(present)}")
            why = f"site {name} is not among the sites ({', '.join(present) or 'none'})"
            raise _too_few(settings, overrides, store, why)
    readers = {TRAIN: joined_reader(sites, TRAIN)}
    if settings.heldout_tokens:
        # Before a reader is opened, as the held-out part of a site may not be there at all.
        rows = min(site.store.rows(HELDOUT, site.name) for site in sites)
        if rows >= settings.heldout_tokens:
            readers[HELDOUT] = joined_reader(sites, HELDOUT)
            rows = int(readers[HELDOUT].sizes.sum())
        if rows < settings.heldout_tokens:
            of = " with ".join(site.name for site in sites)
            why = f"heldout_tokens={settings.heldout_tokens} asks for more than the {rows} held-out tokens of {of}"
            raise _too_few(settings, overrides, sites[0].store, why)
    return readers


def _decoders(sites: Sequence[StoredSite]) -> list[DecodeRows]:
    """Give what makes floats of stored rows, of each of the sites from rows of all of them side by side."""
    if len(sites) == 1:
        return [sites[0].store.rows_of(sites[0].name).values]
    decoders: list[DecodeRows] = []
    column = 0
    for site in sites:
        stored = site.store.row_shape(TRAIN, site.name)[0]
        columns = slice(column, column + stored)
        values = site.store.rows_of(site.name).values
        # Contiguous, as int8 rows are decoded by views that need it.
        decoders.append(partial(_decoded, values, columns))
        column += stored
    return decoders


def _decoded(values: DecodeRows, columns: slice, rows: NDArray[Any]) -> NDArray[Any]:
    return values(np.ascontiguousarray(rows[:, columns]))


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
        every = [site.store.path for site in self.plan.joined] or [self.plan.store.path]
        read = {
            "store": [str(path.resolve() if isinstance(path, Path) else path) for path in every],
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
