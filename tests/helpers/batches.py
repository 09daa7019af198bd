"""Batches of pre-activations to select from: ordinary, tied, negative, equal, skewed."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Draw z [B, F] and a count of its entries."""
    rows, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "few values", "negative", "equal", "skewed latents"]))
    z = rng.normal(size=(rows, width))
    if kind == "few values":
        z = rng.integers(-2, 3, size=z.shape).astype(float)
    elif kind == "negative":
        z = -np.abs(z)
    elif kind == "equal":
        z = np.full_like(z, draw(st.sampled_from([-1.0, 0.0, 2.0])))
    elif kind == "skewed latents":
        z = z + 10 * (np.arange(width) % 7 == 0)
    return torch.from_numpy(z).to(draw(st.sampled_from([torch.float32, torch.float64]))), draw(
        st.integers(1, rows * width)
    )
