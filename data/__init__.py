"""The store of activations and its loader: its public names are in `__all__`.

    loader = ActivationLoader(open_reader(open_store("gpt2-0a1b"), "train", "resid_post.3"), batch=4096)


Whatever starts here imports this package before torch, so this is where threads are told how to wait: OpenMP reads
OMP_WAIT_POLICY once, when torch loads it. By default its threads spin at the end of each parallel region, and where
another process holds one of the cores a training step becomes 10 to 50 times slower; threads that sleep cost nothing
that can be measured on a quiet machine (`python -m benchmarks.neighbour` prints both). A value the user set stands.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from data.base.lazy import getattr_of

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from data.base.errors import UserError
    from data.base.sites import Site
    from data.loading.loader import ActivationLoader
    from data.loading.reader import open_reader
    from data.store.find import open_store
    from data.store.store import Store

__all__ = ["ActivationLoader", "Site", "Store", "UserError", "open_reader", "open_store"]

# Imported when they are first used, so that naming a store needs no torch.
_HOMES = {
    "ActivationLoader": "data.loading.loader",
    "Site": "data.base.sites",
    "Store": "data.store.store",
    "UserError": "data.base.errors",
    "open_reader": "data.loading.reader",
    "open_store": "data.store.find",
}


__getattr__ = getattr_of(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
