"""The store's rows as Lightning takes them: training chunks, reserved calibration chunks, held-out chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from torch import Tensor

from data.loader import ActivationLoader
from data.manifest import HELDOUT, TRAIN
from data.reader import open_reader
from train.plan import Plan


class ActivationData(LightningDataModule):
    """Batches [B, D] of what a `Plan` says. Rank and world are the trainer's, if any.

    The loaders give rows as they are stored; Lightning has them decoded on the training device, others call `decode`.
    """

    def __init__(self, plan: Plan, *, seed: int, pool_chunks: int = 16, threads: int = 2) -> None:
        super().__init__()
        self.plan = plan
        self._decoder = plan.store.decoder(TRAIN, plan.site)
        self.settings: dict[str, Any] = {"seed": seed, "pool_chunks": pool_chunks, "threads": threads}

    def decode(self, rows: Tensor) -> Tensor:
        """Stored rows as activations [B, D], on the rows' device."""
        decoded: Tensor = self._decoder.to(rows.device)(rows)
        return decoded

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return self.decode(batch)

    def _loader(self, split: str, chunks: NDArray[np.int64], **settings: Any) -> ActivationLoader:
        reader = open_reader(self.plan.store, split, self.plan.site)
        settings = {"batch": self.plan.batch, "chunks": chunks, **self.settings, **settings}
        return ActivationLoader(reader, **settings)

    def _share(self) -> dict[str, int]:
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer else {}

    def train_dataloader(self) -> ActivationLoader:
        return self._loader(TRAIN, self.plan.chunks, **self._share())

    def val_dataloader(self) -> ActivationLoader | list[Any]:
        """Held-out rows in the order of the store, the last batch short."""
        if not len(self.plan.heldout):
            return []
        return self._loader(HELDOUT, self.plan.heldout, shuffle=False, drop_last=False, **self._share())

    def calibration_loader(self) -> ActivationLoader:
        """Rows, as stored, of the training split that the optimizer never sees; every rank reads all of them."""
        return self._loader(TRAIN, self.plan.reserved)

    def sample(self, rows: int) -> Tensor:
        """Up to `rows` rows [N, D] of the first epoch's order, in float32; the loaders' positions do not move."""
        return self.decode(self._loader(TRAIN, self.plan.chunks).sample(rows)).to(torch.float32)
