"""A harvest handed to jobs of Slurm; nothing is harvested by the jobs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.base.errors import UserError
from data.slurm.settings import SlurmSettings
from harvest.run import harvest
from harvest.slurm import harvest_by_jobs
from tests.helpers.corpus import config, save_model, write_stories
from tests.helpers.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm that cancels each job at once, so that nobody waits for it."""
    fake = FakeSlurm(tmp_path / "bin")
    fake.begin_as("CANCELLED")
    monkeypatch.setenv("PATH", fake.path)
    return fake


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    model, text = save_model(tmp_path / "model"), write_stories(tmp_path / "stories.jsonl", range(20))
    return config(model, text, tmp_path / "cache", "sites=[resid_post.1]", "tokens=300", "heldout_tokens=50")


def by_jobs(settings: dict[str, Any], folder: Path, **given: Any) -> None:
    harvest_by_jobs(settings, SlurmSettings.of(given), folder / "slurm", harvest)


def test_each_worker_is_a_job(slurm: FakeSlurm, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^3 of 3 workers failed: its job was cancelled"):
        by_jobs(settings, tmp_path, workers=3)
    assert list(slurm.jobs()) == ["1_0", "1_1", "1_2"]


def test_a_store_that_holds_all_of_it_needs_no_job(
    slurm: FakeSlurm, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest(settings)
    capsys.readouterr()
    by_jobs(settings, tmp_path)
    assert " holds all of it (train: resid_post.1 " in capsys.readouterr().out
    assert slurm.jobs() == {}


def test_a_sweep_s_setting_is_refused(slurm: FakeSlurm, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"saes_per_job is for sweeps of train: give a harvest hydra"):
        by_jobs(settings, tmp_path, saes_per_job=2)


def test_a_plan_is_refused_before_anything_is_submitted(
    slurm: FakeSlurm, settings: dict[str, Any], tmp_path: Path
) -> None:
    split = {**settings, "model": {**settings["model"], "tp_plan": "auto"}}
    with pytest.raises(UserError, match=r"tp_plan is for torchrun.* use model.device_map=auto with hydra"):
        by_jobs(split, tmp_path)
    assert slurm.jobs() == {}
