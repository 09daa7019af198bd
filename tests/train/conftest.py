"""A small store of synthetic activations, and the settings of a short run over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data.base.cli import CONF
from data.store.int8 import FeatureScale
from data.store.layout import Layout
from data.store.manifest import HELDOUT, TRAIN, Manifest, store_settings
from data.store.store import Store
from data.store.zarr_bfloat16 import from_float32

SITE, D = "resid_post.3", 16
ROWS = {TRAIN: 4096, HELDOUT: 1024}

Settings = dict[str, Any]
Compose = Callable[..., Settings]


def composed(*overrides: str) -> Settings:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = OmegaConf.to_container(compose("train", [*overrides]), resolve=True)
    assert isinstance(found, dict)
    return found


def activations(rows: int, seed: int) -> np.ndarray:
    """Sparse codes of 48 directions in 16 dimensions, off centre: [rows, D] float32."""
    directions = np.random.default_rng(0).normal(size=(48, D))
    rng = np.random.default_rng(seed)
    codes = rng.exponential(size=(rows, 48)) * (rng.random((rows, 48)) < 0.06)
    return (codes @ directions + 3.0 + 0.05 * rng.normal(size=(rows, D))).astype(np.float32)


def make_store(cache: Path, settings: Settings, name: str = "tiny", dtype: str = "bfloat16", **encoded: Any) -> Store:
    layout = Layout(dtype, context=16, chunk_rows=64, chunks_per_unit=8, mixing_seed=0, **encoded)
    identity = {"format": 1, "layout": layout.json, "model": {"name": name}}
    store = Store.create_or_open(cache, Manifest(identity, store_settings(settings), name, D))
    for seed, (split, rows) in enumerate(ROWS.items()):
        x = activations(rows, seed + 1)
        store.require(split, SITE, D, rows, FeatureScale.of(x))
        for unit in range(rows // layout.unit_rows):
            part = x[unit * layout.unit_rows : (unit + 1) * layout.unit_rows]
            native = from_float32(part) if dtype == "bfloat16" else part
            store.write(split, unit, SITE, native, {"device": "cpu"})
    return store


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, and much slower where the processor is shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one bfloat16 store that the default model, text and packing find."""
    path = tmp_path_factory.mktemp("cache")
    make_store(path, composed("out=x"))
    return path


@pytest.fixture
def short(cache: Path, tmp_path: Path) -> Compose:
    """Settings of a run of 30 steps of 64 tokens into `<tmp>/run`, from the command line's overrides."""

    def make(*overrides: str) -> Settings:
        small = ["batch=64", "tokens=1920", "calibration_tokens=512", "heldout_tokens=512", "trainer=cpu"]
        paces = ["log_every=10", "validate_every=15", "checkpoint_every=10", "loader.pool_chunks=4", "loader.threads=1"]
        families = {"gated": "sparsity=0.02", "jumprelu": "sparsity=0.02", "relu": "sparsity=0.02"}
        variant = next((item.removeprefix("sae=") for item in overrides if item.startswith("sae=")), "batchtopk")
        sparsity = f"sae.{families.get(variant, 'k=4')}"
        places = [f"cache={cache}", f"out={tmp_path / 'run'}"]
        return composed(*small, *paces, *places, sparsity, "sae.expansion=4", *overrides)

    return make


@pytest.fixture
def store_maker() -> Callable[..., Store]:
    return make_store
