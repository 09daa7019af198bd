"""A small store of synthetic activations, and the settings of a short run over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.store.store import Store
from tests.helpers.runs import Compose, Settings, composed, make_store


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
