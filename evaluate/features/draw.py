"""Fair draws that depend on what is drawn alone, so that neither batches nor their order decide what is sampled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def priority(token_n: NDArray[np.int64], latent_n: NDArray[np.int64], width: int, seed: int) -> NDArray[np.float64]:
    """Draw numbers in [0, 1) that depend on (seed, token, latent) alone:
    the largest ones of a latent are a fair sample.

    splitmix64 of token * F + latent, so that neither batches nor order decide what is sampled.
    """
    with np.errstate(over="ignore"):
        z = token_n.astype(np.uint64) * np.uint64(width) + latent_n.astype(np.uint64)
        z += np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
