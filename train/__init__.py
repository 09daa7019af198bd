"""Train SAEs on a store: `train.train(site="resid_post.3", sae="topk", **{"sae.k": 32})` gives a `TrainResult`.

`train_sweep` trains several in one pass. Trained SAEs are loaded by `train.sae.load(folder)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import data  # noqa: F401  (sets how threads wait, before torch is imported)
from data.base.lazy import getattr_of

if TYPE_CHECKING:
    from train.result import TrainResult
    from train.run import train, train_sweep

__all__ = ["TrainResult", "train", "train_sweep"]

# Imported when they are first used, so that naming this package needs no torch.
_HOMES = {"TrainResult": "train.result", "train": "train.run", "train_sweep": "train.run"}


__getattr__ = getattr_of(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
