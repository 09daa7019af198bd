"""Under test the shapes in the signatures are executed: jaxtyping checks them through beartype at every call."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

import data  # noqa: F401  (sets how threads wait, before torch is imported)
from tests.helpers.s3 import Server, serving

# Triton reads this once, when it is first imported, which may be long before the tests of its kernels run.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The modules whose signatures state shapes; the rest import heavy libraries lazily and keep their types for mypy.
SHAPED = [
    "data.store.stats",
    "data.loading.order",
    "data.loading.reader",
    "data.loading.epoch",
    "data.store.int8",
    "data.loading.loader",
    "train.sae",
    "harvest.proof",
    "harvest.hooks",
    "evaluate.features.collect",
    "evaluate.features.weights",
    "evaluate.metrics",
    "evaluate.splice",
    "benchmarks.claims.forms",
]

install_import_hook(SHAPED, "beartype.beartype")

# A busy machine must not fail a property for being slow.
hypothesis.settings.register_profile("thresher", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("thresher")


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power failure would lose is not tested here, and waiting for the disk is most of the time it takes."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One S3 server for all tests; a bucket is a test's own."""
    with serving() as running:
        yield running


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket, with the environment that opens it."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex}"
    server.make(name)
    return f"s3://{name}"


@pytest.fixture(params=["folder", "memory", "s3"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What `cache` may name, of each kind."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/a/cache"
    return str(tmp_path / "cache") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/a/cache"
