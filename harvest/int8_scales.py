"""The first rows of a store, by which its int8 rows are encoded: the same for every process that harvests into it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from data.base.sites import Site
from data.store.int8 import PILOT_ROWS, FeatureScale
from data.store.layout import Layout
from harvest.hooks import run_to
from harvest.packing import PackedTokens


def measure_scales(
    model: nn.Module, text: PackedTokens, layout: Layout, lm_batch: int, sites: Sequence[str]
) -> dict[str, FeatureScale]:
    """The standard of each site, from the first batches of unit 0 of train/ that hold PILOT_ROWS rows, or all of it.

    The batches are those in which the unit itself is run. text: of train/.
    """
    device, dtype = next(model.parameters()).device, getattr(torch, layout.dtype)
    held: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]] = {site: [] for site in sites}
    rows = 0
    for first in range(0, min(len(text.contexts), layout.contexts_per_unit), lm_batch):
        batch = slice(first, min(first + lm_batch, layout.contexts_per_unit))
        ids = torch.from_numpy(text.contexts[batch]).to(device, torch.int64)
        seen = run_to(model, [Site.parse(site) for site in sites], ids)
        mask = torch.from_numpy(text.keep[batch])
        for site in sites:
            held[site].append(seen[site][mask.to(seen[site].device)].to(dtype).float().cpu().numpy())
        rows += int(mask.sum())
        if rows >= PILOT_ROWS:
            break
    return {site: FeatureScale.of(np.concatenate(parts)) for site, parts in held.items()}
