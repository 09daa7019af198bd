"""Reports with made-up numbers, in the form that report.json has."""

from __future__ import annotations

from typing import Any

import numpy as np

VARIANTS = ("batchtopk", "gated", "jumprelu", "matryoshka", "relu", "topk")


def a_row(number: int, variant: str, l0: float, nmse: float, *, width: int = 64, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    metrics = {name: {"value": nmse * 2, "se": 0.01} for name in METRICS}
    metrics |= {"l0": {"value": l0, "se": 0.1}, "nmse": {"value": nmse, "se": 0.002}}
    histogram = np.bincount(rng.poisson(l0, size=1000)).tolist()
    fired = rng.integers(0, 300, size=width).tolist()
    fired[0] = 0
    return {
        "number": number,
        "form": "shipped",
        "folder": f"outputs/train/{variant}-{l0:g}",
        "variant": variant,
        "width": width,
        "expansion": width / 16,
        "settings": {"d_in": 16, "width": width, "k": 4},
        "training": {"tokens": 123_456, "seed": 7, "dead": 3, "dead_after": 1000},
        "metrics": metrics,
        "l0": {"std": 1.5, "histogram": histogram, "by_position": [None, l0], "fired": fired, "silent": 1},
        "storage_share": 0.001,
        "pareto": ["nmse"],
    }


METRICS = [
    "ev",
    *("nmse_token", "nmse_btk", "cosine", "gamma", "gamma_c"),
    *("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "ce_increase", "recovered_zero", "recovered_mean", "kl"),
]


def a_report(rows: list[dict[str, Any]], **site: Any) -> dict[str, Any]:
    base = {
        "site": "resid_post.3",
        "store": "lm-0123456789ab",
        "fingerprint": "0123456789abcdef",
        "model": "lm",
        "d_model": 16,
        "split": "heldout",
        "context": 32,
        "sequences": 40,
        "tokens": 1000,
        "excluded": 40,
        "predicted": 960,
        "storage": {"dtype": "bfloat16", "nmse": 1.2e-5},
        "documents": 60,
        "baseline": None,
        "saes": rows,
    }
    return {
        "format": 1,
        "settings": {"tokens": 1000, "bootstrap": 100, "seed": 0, "form": "shipped"},
        "sites": [base | site],
    }
