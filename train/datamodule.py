"""The store's rows as Lightning takes them: training chunks, reserved calibration chunks, held-out chunks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch import Tensor

from data.base.errors import UserError
from data.base.files import format_bytes
from data.loading.loader import ActivationLoader
from data.store.manifest import HELDOUT, TRAIN
from train.plan import DataPlan
from train.sae import Batch
from train.sae.parts.groups import ALONE
from train.sites import StoredSite


def _must_fit(loader: ActivationLoader, device: torch.device, preload: str) -> None:
    """Raise UserError where the rows that a loader is to keep on a device are more than it has room for."""
    wanted, room = loader.rows * loader.reader.width * loader.reader.dtype.itemsize, free_bytes(device)
    if wanted > room:
        raise UserError(
            f"loader.preload={preload} would keep {format_bytes(wanted)} of training rows on {device}, where "
            f"{format_bytes(room)} are free: use loader.preload=null, which reads them pool by pool"
        )


def free_bytes(device: torch.device) -> int:
    """Measure the memory that can be had on a device now; what is not a CUDA device has the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # the page cache counts as free, as it is
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class ActivationData(LightningDataModule):
    """Batches of what a `DataPlan` says. The device is the trainer's, if any; `ranks` are those that share a batch.

    The loaders give rows as they are stored, which `model_units` decodes on the training device.
    preload: where the training rows are kept after they are read once, "ram" or "device"; a UserError where they do
    not fit. Without it pools are read ahead into main memory, or sent to a GPU one by one.
    """

    def __init__(
        self, plan: DataPlan, *, seed: int, pool_chunks: int = 16, threads: int = 2, preload: str | None = None
    ) -> None:
        super().__init__()
        self.plan = plan
        self.preload = preload
        self.ranks = ALONE
        self.training: ActivationLoader | None = None
        sites = plan.joined or (StoredSite(plan.store, plan.site),)
        if plan.target is not None:
            sites = (*sites, StoredSite(plan.store, plan.target))
        self._decoders = [site.store.decoder(TRAIN, site.name) for site in sites]
        self._stored_widths = [site.store.row_shape(TRAIN, site.name)[0] for site in sites]
        self.settings: dict[str, Any] = {"seed": seed, "pool_chunks": pool_chunks, "threads": threads}

    def model_units(self, rows: Tensor) -> Batch:
        """Convert stored rows to float32 activations [B, D], a transcoder's with its target [B, E], a crosscoder's
        sites side by side, on the rows' device: the one place where they become so."""
        # On the training device: int8 rows travel as half the bytes, and a GPU decodes them in passing.
        parts = []
        for decoder, stored in zip(self._decoders, torch.split(rows, self._stored_widths, 1), strict=True):
            parts.append(decoder.to(rows.device)(stored.contiguous()).to(torch.float32))
        if self.plan.joined:
            return Batch(torch.cat(parts, 1))
        return Batch(*parts)

    def _loader(self, split: str, chunks: NDArray[np.int64], **settings: Any) -> ActivationLoader:
        settings = {"batch": self.plan.batch, "chunks": chunks, **self.settings, **settings}
        return ActivationLoader(self.plan.readers[split], **settings)

    def _share(self) -> dict[str, int]:
        return {"rank": self.ranks.rank, "world": self.ranks.size}

    def train_dataloader(self) -> ActivationLoader:
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        settings: dict[str, Any] = {"device": device if device.type == "cuda" else None}
        if self.preload:
            settings = {"device": device if self.preload == "device" else torch.device("cpu"), "preload": True}
        self.training = self._loader(TRAIN, self.plan.chunks, **self._share(), **settings)
        if self.preload:
            _must_fit(self.training, settings["device"], self.preload)
        return self.training

    @property
    def waited(self) -> float:
        """Return the seconds that the training's batches were waited for."""
        return self.training.waited if self.training else 0.0

    def val_dataloader(self) -> ActivationLoader | list[Any]:
        """Return the held-out rows in the order of the store, the last batch short."""
        if not len(self.plan.heldout):
            return []
        return self._loader(HELDOUT, self.plan.heldout, shuffle=False, drop_last=False, **self._share())

    def calibration_loader(self) -> ActivationLoader:
        """Return rows, as stored, of the training split that the optimizer never sees; every rank its part."""
        return self._loader(TRAIN, self.plan.reserved, **self._share())

    def sample(self, rows: int) -> Batch:
        """Read up to `rows` rows of the first epoch's order, in float32;
        the loaders' positions do not move."""
        return self.model_units(self._loader(TRAIN, self.plan.chunks).sample(rows))
