"""SAEs whose figures are known beforehand: columns made by hand behind a `Scored`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from benchmarks.claims.scores import Candidate, Scored
from evaluate.inputs import SavedSAE
from tests.helpers.tiny_lm import harvested, tiny_lm

__all__ = ["harvested", "tiny_lm"]

DOCUMENTS, TOKENS = 40, 10


class Made(Protocol):
    def __call__(self, variant: str, width: int, *, nmse: float, l0: float, **told: Any) -> Scored: ...


@pytest.fixture(scope="session")
def made() -> Made:
    """An SAE over d_in 16 with this NMSE and L0, and what `told` says: k, seed, batch, ce, gamma, dead, form, options.

    All have the same documents, some harder than others, so that paired differences have no spread but `noise`.
    """
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.5, 1.5, DOCUMENTS)
    hard /= hard.mean()

    def make(variant: str, width: int, *, nmse: float, l0: float, **told: Any) -> Scored:
        tokens = np.full(DOCUMENTS, float(TOKENS))
        noise = 1 + told.get("noise", 0.0) * rng.standard_normal(DOCUMENTS)
        squares = {"deviation": tokens, "deviation_token": tokens, "error": nmse * tokens * hard * noise}
        gamma = told.get("gamma", 1.0)
        columns = {
            **squares,
            "error_token": tokens,
            "error_btk": tokens,
            "cosine": tokens,
            **{"norm": gamma * tokens, "dot": tokens, "norm_c": tokens, "dot_c": tokens},
            **{"tokens": tokens, "predicted": tokens, "clean": tokens, "zero": 3 * tokens, "mean": 2 * tokens},
            **{"kl": tokens, "l0": l0 * tokens, "spliced": tokens * (1 + told.get("ce", 0.1) * hard * noise)},
        }
        settings = {"d_in": 16, "width": width, "k": told.get("k"), **told.get("options", {})}
        training = {"tokens": 1000, "seed": told.get("seed", 0), "batch": told.get("batch", 8)}
        training |= {"dead": told.get("dead", 0), "dead_after": 100}
        config = {"variant": variant, "settings": settings, "training": training}
        counts = told.get("counts", np.full((2, DOCUMENTS, 2), [[[0, TOKENS]], [[0, 0]]], np.int32))
        firing = {"by_position": [1.0] * TOKENS}
        candidate = Candidate(SavedSAE(Path("nowhere"), config), told.get("form", "inference"))
        return Scored(candidate, columns, firing, counts, samples=200, seed=0)

    return make
