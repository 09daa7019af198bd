"""A Slurm in which nothing runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """The commands of a Slurm whose jobs the test changes itself, and no others."""
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    return fake
