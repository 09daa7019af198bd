"""The first rows of a store, by which its int8 rows are encoded: the same for every process that harvests into it.

A site may have massive activations (data/store/massive.py). The scales are those of the ordinary rows: a deviation that
a few massive rows made would leave the others a few of the 255 steps. A massive row has a range of its own, by the
scale that each row carries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data.base.sites import Site
from data.store.int8 import PILOT_ROWS, FeatureScale
from data.store.layout import Layout
from data.store.massive import TIMES_MEDIAN
from harvest.hooks import run_to
from harvest.lm import input_device
from harvest.packing import PackedText

_Rows = NDArray[np.float32]


def measure_scales(
    model: nn.Module, text: PackedText, layout: Layout, lm_batch: int, sites: Sequence[str]
) -> dict[str, FeatureScale]:
    """Measure the scale of each site on the ordinary rows of the pilot.

    The pilot is the first batches of unit 0 of train/ that hold PILOT_ROWS rows, or all of it: the batches in which
    the unit itself is run. text: of train/.
    """
    device, dtype = input_device(model), getattr(torch, layout.dtype)
    parts: dict[str, list[_Rows]] = {site: [] for site in sites}
    rows = 0
    for first in range(0, min(len(text.contexts), layout.contexts_per_unit), lm_batch):
        batch = slice(first, min(first + lm_batch, layout.contexts_per_unit))
        ids = torch.from_numpy(text.contexts[batch]).to(device, torch.int64)
        seen = run_to(model, [Site.parse(site) for site in sites], ids)
        mask = torch.from_numpy(text.keep[batch])
        for site in sites:
            parts[site].append(seen[site][mask.to(seen[site].device)].to(dtype).float().cpu().numpy())
        rows += int(mask.sum())
        if rows >= PILOT_ROWS:
            break
    return {site: FeatureScale.of(ordinary_rows(np.concatenate(parts[site]))) for site in sites}


def ordinary_rows(x_ND: _Rows) -> _Rows:
    """Keep the rows whose norm is at most 10 times the median; all where none is above, and those not finite."""
    norms_N = np.linalg.norm(x_ND.astype(np.float64), axis=1)
    finite_N = np.isfinite(norms_N)
    if not finite_N.any():
        return x_ND
    massive_N = finite_N & (norms_N > TIMES_MEDIAN * np.median(norms_N[finite_N]))
    return x_ND[~massive_N] if massive_N.any() else x_ND
