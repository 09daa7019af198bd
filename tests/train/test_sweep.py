"""Names of a sweep's folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from train.sweep import job_folder

SWEPT = frozenset({"sae", "sae.k"})
JOB = ["sae=topk", "sae.k=2", "batch=64", "cache=/somewhere"]


def begin(sweep: Path, name: str, overrides: Sequence[str]) -> None:
    """Leave what Hydra leaves in a job's folder."""
    (sweep / name / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(list(overrides)), sweep / name / ".hydra" / "overrides.yaml")


def test_a_folder_is_named_by_what_the_sweep_varies(tmp_path: Path) -> None:
    assert job_folder(JOB, SWEPT, str(tmp_path)) == "sae.k-2_sae-topk"


def test_settings_without_effect_on_numbers_neither_name_nor_part_folders(tmp_path: Path) -> None:
    assert job_folder([*JOB, "log_every=3"], SWEPT | {"log_every"}, str(tmp_path)) == "sae.k-2_sae-topk"
    begin(tmp_path, "sae.k-2_sae-topk", [*JOB, "checkpoint_every=7"])
    assert job_folder([*JOB, "log_every=3"], SWEPT, str(tmp_path)) == "sae.k-2_sae-topk"


def test_a_job_that_has_begun_keeps_its_folder_whatever_its_name(tmp_path: Path) -> None:
    begin(tmp_path, "an_older_name", JOB[::-1])
    assert job_folder(JOB, SWEPT, str(tmp_path)) == "an_older_name"


def test_another_job_s_name_is_not_taken(tmp_path: Path) -> None:
    begin(tmp_path, "sae.k-2_sae-topk", [*JOB, "tokens=5"])
    name = job_folder(JOB, SWEPT, str(tmp_path))
    assert name.startswith("sae.k-2_sae-topk_") and name == job_folder(JOB, SWEPT, str(tmp_path))


def test_a_long_name_is_cut_and_stays_its_own(tmp_path: Path) -> None:
    """Two jobs that differ only far behind the cut."""
    many = [f"sae.setting_{i}=1.5" for i in range(40)]
    swept = frozenset(item.split("=")[0] for item in [*many, "tokens=1"])
    names = {job_folder([*many, f"tokens={tokens}"], swept, str(tmp_path)) for tokens in (10, 20)}
    assert len(names) == 2 and all(len(name) <= 110 for name in names)


def test_no_character_of_a_value_leaves_the_folder(tmp_path: Path) -> None:
    name = job_folder(["site=../../a b"], frozenset({"site"}), str(tmp_path))
    assert name == "site-..-..-a-b"
