"""What a training run will read and for how long: every check that needs neither the device nor Lightning."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from data.base.location import parse_location
from data.base.records import canonical, diff_fields
from data.base.settings import number, whole
from data.base.sites import Site
from data.loading.norm_filter import DecodeRows, NormFilteredReader, median_norm, moments
from data.loading.order import batches_per_epoch, split_calibration
from data.loading.reader import Reader, open_reader
from data.store import store as stores
from data.store.find import find, open_store, pick
from data.store.manifest import HELDOUT, TRAIN, store_settings

if TYPE_CHECKING:
    from train.sae import SAE

Settings = dict[str, Any]

COUNTS = {  # the least each may be
    **dict.fromkeys(("tokens", "batch", "epochs", "log_every", "validate_every", "checkpoint_every"), 1),
    **dict.fromkeys(("calibration_tokens", "heldout_tokens", "seed"), 0),
}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
MATMULS = ("float32", "tf32", "bf16")
OURS = ("strategy", "max_steps", "max_epochs", "max_time", "limit_train_batches", "fast_dev_run", "overfit_batches")
EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # logger: module; the extra has the logger's name
LAST = Path("checkpoints") / "last.ckpt"  # below the folder of a run


@dataclass(frozen=True)
class Outliers:
    """Rows with a norm above `times` the `median` of the training rows, which are left out everywhere."""

    times: float
    median: float
    left_out: dict[str, int]  # rows, by split


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
    readers: dict[str, Reader]  # of train/ and, if there is validation, heldout/
    outliers: Outliers | None = None

    @property
    def tokens(self) -> int:
        """Tokens the optimizer sees, repeated passes counted."""
        return self.steps * self.batch * self.world

    def moments(self) -> dict[str, float]:
        """E ||x||^2 and the variance of the training rows, less the outliers that are left out."""
        stats, reader = self.store.stats(TRAIN, self.site), self.readers[TRAIN]
        if isinstance(reader, NormFilteredReader):
            return moments(stats, reader.left_out)
        return {"mean_sq_norm": stats.mean_sq_norm, "variance": stats.variance}


def world_size(trainer: Settings, multirun: bool) -> int:
    """Ranks of the run; refuses what Lightning would start from inside a Hydra sweep."""
    outside = "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ
    devices, nodes = trainer["devices"], int(trainer.get("num_nodes", 1))
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices={devices} is not a number of devices: give an integer of at least 1")
    if multirun and devices * nodes > 1 and not outside:
        raise UserError(
            f"trainer.devices={devices} inside a sweep would start the whole sweep again on every device: "
            "use trainer.devices=1, or start the ranks yourself (torchrun -m train ...)"
        )
    return devices * nodes


def checked(settings: Settings) -> Settings:
    """The settings with their counts as whole numbers; UserError for what they cannot be. No file is read."""
    counts: Settings = {name: whole(settings, name, least) for name, least in COUNTS.items()}
    preload = settings["loader"]["preload"]
    if preload not in (None, "ram", "device"):
        raise UserError(f"loader.preload={preload} is unknown: choose null, ram or device")
    loader = {name: whole(settings["loader"], name, 1) for name in settings["loader"] if name != "preload"}
    for name in ("lr_warmup", "lr_decay", "sparsity_warmup"):
        number(settings, name, 0, 1)  # shares of the run
    if settings["clip"] is not None and number(settings, "clip", 0, math.inf) == 0:
        raise UserError("clip=0 would stop every step: give a positive norm, or null for no clipping")
    if settings["ema"] is not None and not 0 < number(settings, "ema", 0, 1) < 1:
        raise UserError(f"ema={settings['ema']} is no mean of weights: give a number between 0 and 1, or null")
    if settings["lr_at_width"] is not None:
        counts["lr_at_width"] = whole(settings, "lr_at_width", 1)
    if settings["outliers"] is not None:
        counts["outliers"] = number(settings, "outliers", 1, math.inf)  # below the median is no outlier
    if settings["dead_after"] is not None:
        counts["dead_after"] = whole(settings, "dead_after", 1)
    if (accelerator := settings["trainer"]["accelerator"]) not in ACCELERATORS:
        raise UserError(f"trainer.accelerator={accelerator} is unknown: choose one of {', '.join(ACCELERATORS)}")
    if (precision := settings["trainer"].get("precision", "32-true")) != "32-true":
        raise UserError(
            f"trainer.precision={precision} would round weights or reconstructions, which stay 32-bit here: "
            "leave it out, and set matmul=bf16 for a faster encoder"
        )
    if (matmul := settings["matmul"]) not in (None, *MATMULS):
        raise UserError(f"matmul={matmul} is unknown: choose one of {', '.join(MATMULS)}, or null for the device's own")
    if given := [name for name in OURS if name in settings["trainer"]]:
        raise UserError(f"trainer.{given[0]} is settled by this trainer and would be ignored: leave it out")
    logger = settings["logger"]["name"]
    if logger in EXTRAS and importlib.util.find_spec(EXTRAS[logger]) is None:
        raise UserError(f'logger={logger} is not installed: .venv/bin/pip install -e ".[{logger}]", or use logger=csv')
    return {**settings, **counts, "loader": loader | {"preload": preload}}


def harvest_line(settings: Settings, overrides: Sequence[str], tokens: int) -> str:
    """The command that makes what this training asks for: its model, text and packing, its site and enough tokens."""
    groups = ("experiment", "model", "text", "packing", "cache", "lm_batch")
    kept = [item for item in overrides if item.lstrip("+~").split("=")[0].split(".")[0].split("@")[0] in groups]
    parts = [*kept, f"sites=[{settings['site']}]", f"tokens={tokens}", f"heldout_tokens={settings['heldout_tokens']}"]
    return f'make harvest ARGS="{" ".join(parts)}"'


def find_store(settings: Settings, overrides: Sequence[str]) -> stores.Store:
    """The store named by `store`, else the one in `cache` whose model, text and packing are the configured ones."""
    if settings["store"]:
        return open_store(settings["store"], parse_location(settings["cache"]))
    found = find(parse_location(settings["cache"]), store_settings(settings))
    if not found:
        line = harvest_line(settings, overrides, wanted_rows(settings, margin=1.05))
        raise UserError(f"no store in {settings['cache']} holds this model, text and packing; make it with: {line}")
    return pick(found)


def origin(store: stores.Store, site: str) -> Settings:
    """What an SAE's config.json keeps of the activations it is of; `model_name` has no folder of this machine in it."""
    manifest = store.manifest
    names = {"site": site, "fingerprint": manifest.fingerprint, "store": manifest.folder}
    asked = {"model": manifest.settings["model"], "packing": manifest.settings["packing"]}
    return {**names, **asked, "model_name": manifest.identity["model"]["name"]}


def wanted_rows(settings: Settings, margin: float = 1.0) -> int:
    """Rows of train/ that one pass of the budget and the calibration need; `margin` leaves room for whole chunks."""
    rows: float = settings["tokens"] / settings["epochs"] + settings["calibration_tokens"]
    return math.ceil(rows * margin)


def _kept_by(store: stores.Store) -> list[str]:
    """What a harvest must be told to add to this store, beside its settings."""
    lm_batch = store.manifest.identity.get("lm_batch")
    return [] if lm_batch is None else [f"lm_batch={lm_batch}"]


def _too_few(settings: Settings, overrides: Sequence[str], store: stores.Store, why: str) -> UserError:
    world = int(settings["trainer"]["devices"]) * int(settings["trainer"].get("num_nodes", 1))
    rows = wanted_rows(settings) + settings["batch"] * world + store.layout.chunk_rows
    line = harvest_line(settings, [*overrides, *_kept_by(store)], rows)
    remedy = f"make them with: {line}"
    if settings["store"] and (fields := diff_fields(store.manifest.settings, store_settings(settings))):
        remedy = (
            f"harvest them with the settings that store was made with (they differ from yours: {'; '.join(fields)})"
        )
    return UserError(f"{why} in {store.path}; {remedy}")


def _first_chunks(reader: Reader, rows: int) -> NDArray[np.int64]:
    count = int(np.searchsorted(np.cumsum(reader.sizes), rows)) + 1 if rows else 0
    return np.arange(min(count, len(reader.sizes)))


def _kept_readers(
    readers: dict[str, Reader], settings: Settings, chunks: int, decode: DecodeRows
) -> tuple[dict[str, Reader], Outliers]:
    """The readers without the outliers that `outliers` names; reads every row once."""
    median = median_norm(readers[TRAIN], chunks, decode)
    limit, threads = settings["outliers"] * median, settings["loader"]["threads"]
    counts = {split: chunks if split == TRAIN else len(reader.sizes) for split, reader in readers.items()}
    kept = {
        split: NormFilteredReader(one, counts[split], limit, decode, threads=threads) for split, one in readers.items()
    }
    left_out = {split: reader.left_out.rows for split, reader in kept.items()}
    return {**kept}, Outliers(settings["outliers"], median, left_out)


def make_plan(
    settings: Settings, overrides: Sequence[str] = (), multirun: bool = False, stored_chunks: int | None = None
) -> DataPlan:
    """Find the store and check that it covers site, tokens and held-out tokens; raises UserError with the remedy.

    `stored_chunks`: take only so many chunks of train/, the first, as a run did that goes on after the store grew.
    """
    settings = checked(settings)
    world = world_size(settings["trainer"], multirun)
    site, batch = str(Site.parse(str(settings["site"]))), settings["batch"]
    store = find_store(settings, overrides)
    if site not in store.sites(TRAIN):
        held = ", ".join(store.sites(TRAIN)) or "none"
        raise _too_few(settings, overrides, store, f"site {site} is not among the sites ({held})")
    if (have := store.rows(HELDOUT, site) if settings["heldout_tokens"] else 0) < settings["heldout_tokens"]:
        why = f"heldout_tokens={settings['heldout_tokens']} asks for more than the {have} held-out tokens of {site}"
        raise _too_few(settings, overrides, store, why)
    readers = {TRAIN: open_reader(store, TRAIN, site)}
    if settings["heldout_tokens"]:
        readers[HELDOUT] = open_reader(store, HELDOUT, site)
    stored_chunks = len(readers[TRAIN].sizes[:stored_chunks])
    outliers = None
    if settings["outliers"] is not None:
        readers, outliers = _kept_readers(readers, settings, stored_chunks, store.rows_of(site).values)
    sizes = readers[TRAIN].sizes[:stored_chunks]
    rows = int(sizes.sum())
    steps = settings["tokens"] // (batch * world)
    if steps < 1:
        raise UserError(
            f"tokens={settings['tokens']} is less than one step of batch={batch} on {world} ranks: raise it"
        )
    enough = rows > settings["calibration_tokens"]
    if enough:
        chunks, reserved = split_calibration(sizes, settings["calibration_tokens"], settings["seed"])
        one_pass = batches_per_epoch(int(sizes[chunks].sum()), batch=batch, world=world)
    if not enough or one_pass * settings["epochs"] < steps:
        asked = f"tokens={settings['tokens']} with calibration_tokens={settings['calibration_tokens']}"
        passes = f" in {settings['epochs']} passes (epochs)"
        raise _too_few(settings, overrides, store, f"{asked} needs more than the {rows} training tokens{passes}")
    heldout = _first_chunks(readers[HELDOUT], settings["heldout_tokens"]) if HELDOUT in readers else np.arange(0)
    if outliers and int(readers[HELDOUT].sizes.sum() if HELDOUT in readers else 0) < settings["heldout_tokens"]:
        asked = f"heldout_tokens={settings['heldout_tokens']} with outliers={settings['outliers']:g}"
        have = int(readers[HELDOUT].sizes.sum())
        raise _too_few(settings, overrides, store, f"{asked} needs more than the {have} held-out tokens that are left")
    width, reserved_rows = store.decoder(TRAIN, site).width, int(sizes[reserved].sum())
    parts = (chunks, reserved, heldout, stored_chunks, reserved_rows, readers, outliers)
    return DataPlan(store, site, width, batch, world, steps, *parts)


@dataclass
class TrainRun:
    """One SAE to be trained as `plan` says into `folder`.

    name: tells it from the others of its sweep. step: where its checkpoint stands, 0 for a new one. sweep: the folder
    of the sweep it is of, None where it was asked for alone.
    """

    settings: Settings
    plan: DataPlan
    sae: SAE
    folder: Path
    name: str
    step: int = 0
    sweep: Path | None = None

    def stream(self) -> dict[str, Any]:
        """What runs of one pass have in common: what is read, in which order, on what, at what pace."""
        names = ("batch", "seed", "epochs", "outliers", "calibration_tokens", "heldout_tokens", "loader", "trainer")
        paces = ("validate_every", "checkpoint_every", "matmul")
        store = self.plan.store.path
        place = {"store": str(store.resolve() if isinstance(store, Path) else store), "site": self.plan.site}
        extent = {"tokens": self.plan.tokens, "stored_chunks": self.plan.stored_chunks, "world": self.plan.world}
        return place | extent | {name: self.settings[name] for name in (*names, *paces)}


def group_by_stream(runs: Sequence[TrainRun]) -> list[list[TrainRun]]:
    """The runs by the pass over the cache that trains them: of one stream, and less than two checkpoints apart.

    Checkpoints of one pass stand at one step, or one apart where a kill came between their files.
    """
    found: list[list[TrainRun]] = []
    latest: dict[str, list[TrainRun]] = {}
    for run in sorted(runs, key=lambda run: run.step):
        stream = canonical(run.stream())
        if stream not in latest or run.step - latest[stream][-1].step > run.settings["checkpoint_every"]:
            latest[stream] = []
            found.append(latest[stream])
        latest[stream].append(run)
    return found
