"""Fixtures of the evaluation's tests."""

from pathlib import Path

import pytest

from evaluate.features import pages
from tests.helpers.browser import browser, running
from tests.helpers.pages import a_page
from tests.helpers.tiny_lm import constant_sae, harvested, identity_sae, relu_lm, rough_sae, tiny_lm

__all__ = ["browser", "constant_sae", "harvested", "identity_sae", "relu_lm", "rough_sae", "running", "tiny_lm"]


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pages of 11 latents in pieces of 3, all text hostile."""
    monkeypatch.setattr(pages, "LATENTS_A_PIECE", 3)
    return a_page(tmp_path / "features", 11)[1]
