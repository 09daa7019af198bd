"""Under test the shapes in the signatures are executed: jaxtyping checks them through beartype at every call."""

import os

import hypothesis
import pytest
from jaxtyping import install_import_hook

# The modules whose signatures state shapes; the rest import heavy libraries lazily and keep their types for mypy.
SHAPED = [
    "data.stats",
    "data.order",
    "data.reader",
    "data.batches",
    "data.encoding",
    "data.loader",
    "train.sae",
    "harvest.site",
    "evaluate.metrics",
    "evaluate.splice",
]

install_import_hook(SHAPED, "beartype.beartype")

# A busy machine must not fail a property for being slow.
hypothesis.settings.register_profile("thresher", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("thresher")


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power failure would lose is not tested here, and waiting for the disk is most of the time it takes."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
