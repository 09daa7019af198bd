"""A small store of synthetic activations, and the settings of a short run over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from data.store.store import Store
from tests.helpers.runs import Compose, composed, make_store, short_run


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
    """Settings of a short run into `<tmp>/run`, from the command line's overrides."""
    return partial(short_run, cache, tmp_path / "run")


@pytest.fixture
def store_maker() -> Callable[..., Store]:
    return make_store
