"""Harvest a model's activations: `harvest.harvest(sites=["resid_post.3"], tokens=2_000_000)` gives the `data.Store`.

`capture` and `replace` read and change a site in each forward of a model that `load_model` gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import data  # noqa: F401  (sets how threads wait, before torch is imported)
from data.base.lazy import getattr_of

if TYPE_CHECKING:
    from harvest.hooks import capture, replace
    from harvest.lm import load_model, load_tokenizer
    from harvest.run import harvest

__all__ = ["capture", "harvest", "load_model", "load_tokenizer", "replace"]

# Imported when they are first used, so that naming this package needs no torch.
_HOMES = {
    "capture": "harvest.hooks",
    "harvest": "harvest.run",
    "load_model": "harvest.lm",
    "load_tokenizer": "harvest.lm",
    "replace": "harvest.hooks",
}


__getattr__ = getattr_of(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
