"""A small store of synthetic activations, short runs over it, and what two runs must have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.store.int8 import FeatureScale
from data.store.layout import Layout
from data.store.manifest import HELDOUT, TRAIN, Manifest, store_settings
from data.store.store import Store
from data.store.zarr_bfloat16 import from_float32
from tests.helpers import composing
from train.callbacks import LastCheckpoint
from train.config import TrainSettings
from train.plan import DataPlan, make_plan
from train.resume import LAST

SITE, D = "resid_post.3", 16
TARGET, E = "mlp_out.3", 12
ROWS = {TRAIN: 4096, HELDOUT: 1024}

Settings = dict[str, Any]
Compose = Callable[..., Settings]


def composed(*overrides: str) -> Settings:
    """The settings of a run; where it reads and writes makes no other composition."""
    given = [item.partition("=") for item in overrides]
    places = {f"{name}_here": value for name, _, value in given if name in ("cache", "out") and value != "null"}
    words = (f"{name}={name}_here" if f"{name}_here" in places else name + sign + value for name, sign, value in given)
    return composing.composed("train", tuple(words), places)


def short_run(cache: Path, folder: Path, *overrides: str) -> Settings:
    """Settings of a run of 30 steps of 64 tokens into a folder."""
    small = ["batch=64", "tokens=1920", "calibration_tokens=512", "heldout_tokens=512", "trainer=cpu"]
    paces = ["log_every=10", "validate_every=15", "checkpoint_every=10", "loader.pool_chunks=4", "loader.threads=1"]
    families = {"gated": "sparsity=0.02", "jumprelu": "sparsity=0.02", "relu": "sparsity=0.02"}
    variant = next((item.removeprefix("sae=") for item in overrides if item.startswith("sae=")), "batchtopk")
    sparsity = f"sae.{families.get(variant, 'k=4')}"
    places = [f"cache={cache}", f"out={folder}"]
    return composed(*small, *paces, *places, sparsity, "sae.expansion=4", *overrides)


def activations(rows: int, seed: int) -> np.ndarray:
    """Sparse codes of 48 directions in 16 dimensions, off centre: [rows, D] float32."""
    directions = np.random.default_rng(0).normal(size=(48, D))
    rng = np.random.default_rng(seed)
    codes = rng.exponential(size=(rows, 48)) * (rng.random((rows, 48)) < 0.06)
    return (codes @ directions + 3.0 + 0.05 * rng.normal(size=(rows, D))).astype(np.float32)


def make_store(
    cache: Path,
    settings: Settings,
    name: str = "tiny",
    dtype: str = "bfloat16",
    sink_every: int | None = None,
    **encoded: Any,
) -> Store:
    """Write the store; with `sink_every` one row in so many is a massive activation of its first dimension."""
    layout = Layout(dtype, context=16, chunk_rows=64, chunks_per_unit=8, mixing_seed=0, **encoded)
    identity = {"format": 1, "layout": layout.json, "model": {"name": name}}
    store = Store.create_or_open(cache, Manifest(identity, store_settings(settings), name, D))
    for seed, (split, rows) in enumerate(ROWS.items()):
        x = activations(rows, seed + 1)
        if sink_every is not None:
            x[::sink_every, 0] = 4000.0  # the median norm is near 15
        store.require(split, SITE, D, rows, FeatureScale.of(x))
        for unit in range(rows // layout.unit_rows):
            part = x[unit * layout.unit_rows : (unit + 1) * layout.unit_rows]
            native = from_float32(part) if dtype == "bfloat16" else part
            store.write(split, unit, SITE, native, {"device": "cpu"})
    return store


def add_target(
    store: Store, site: str = TARGET, splits: Sequence[str] = (TRAIN, HELDOUT), sink_every: int | None = None
) -> None:
    """Give a store a second site of width E: each row a fixed function of the first site's row at its place.

    With `sink_every` one row in so many is massive.
    """
    weights = np.random.default_rng(7).normal(size=(D, E)).astype(np.float32)
    for split, seed in zip((TRAIN, HELDOUT), (1, 2), strict=True):
        if split not in splits:
            continue
        y = np.maximum(activations(ROWS[split], seed) - 3, 0) @ weights + 5
        if sink_every is not None:
            y[::sink_every, 0] = 40_000.0
        store.require(split, site, E, len(y), FeatureScale.of(y))
        for unit in range(len(y) // store.layout.unit_rows):
            part = y[unit * store.layout.unit_rows : (unit + 1) * store.layout.unit_rows]
            native = from_float32(part) if store.layout.dtype == "bfloat16" else part
            store.write(split, unit, site, native, {"device": "cpu"})


def plan_of(settings: Settings, *args: Any, **kwargs: Any) -> DataPlan:
    """The plan of a run's settings, as composed."""
    return make_plan(TrainSettings.of(settings), *args, **kwargs)


class Broken(RuntimeError):
    pass


def leaves(obj: Any, at: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists by its path."""
    if isinstance(obj, dict):
        return {k: v for name, part in obj.items() for k, v in leaves(part, f"{at}/{name}").items()}
    if isinstance(obj, list | tuple):
        return {k: v for i, part in enumerate(obj) for k, v in leaves(part, f"{at}/{i}").items()}
    return {at: obj}


def final_state(folder: Path) -> dict[str, Any]:
    """Everything the last checkpoint holds."""
    return leaves(torch.load(folder / LAST, weights_only=True))


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, f"{name}: {value} and {b[name]}"


def break_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the run right after the checkpoint of `step`."""
    kept = LastCheckpoint.on_train_batch_end

    def hook(self: LastCheckpoint, trainer: Any, module: Any, *args: Any) -> None:
        kept(self, trainer, module, *args)
        if module.step == step:
            raise Broken

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_end", hook)


def assert_same_sae(folder: Path, other: Path) -> None:
    """Weights, metrics and, but for its times, the record are the same bytes."""
    for name in ("sae.safetensors", "metrics.csv"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, other)]
    for config in configs:
        for name in ("seconds", "waited"):
            config["training"].pop(name)
    assert configs[0] == configs[1]
