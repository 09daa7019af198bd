"""SAEBench beside ours: refusals before anything starts, the table, and in its own environment the figures."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.agreement import ROOT
from benchmarks.saebench.run import (
    ROWS,
    Group,
    SAEBenchSettings,
    ask_the_hub,
    distinct_names,
    run_saebench,
    table,
)
from data.base.errors import UserError
from evaluate.inputs import find_saes
from harvest.lm import LanguageModel
from tests.helpers.settings import stage_config
from tests.helpers.tiny_lm import harvest_of, harvested, rough_sae, tiny_gpt2, tiny_lm
from train.sae.io import save
from train.sae.variants.relu import ReLU

__all__ = ["harvested", "rough_sae", "tiny_lm"]  # fixtures

PYTHON = ROOT / ".venv-saebench/bin/python"
inside = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-saebench: `make saebench` makes it")


def saved(folder: Path, sae: ReLU, store: Any, **more: Any) -> Path:
    """The SAE as training leaves it, with what an export wants to know."""
    settings = store.manifest.settings
    record = {"site": "resid_post.0", "fingerprint": store.manifest.fingerprint, "store": store.manifest.folder}
    save(sae, folder, record | {"model_name": store.manifest.name, "packing": settings["packing"], **more})
    return folder


@pytest.fixture
def config(harvested: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path) -> dict[str, Any]:
    """A saved SAE, and an environment that has an interpreter and no SAEBench."""
    saved(tmp_path / "saes" / "rough", rough_sae(16), harvested["store"])
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "env" / "bin" / "python").chmod(0o755)
    own = {"saes": str(tmp_path / "saes"), "environment": str(tmp_path / "env"), "out": str(tmp_path / "out")}
    return stage_config("saebench", cache=harvested["config"]["cache"], device="cpu", tokens=250, **own)


def test_conf_has_every_setting_with_the_default_of_the_schema() -> None:
    given = stage_config("saebench")
    assert set(given) == set(SAEBenchSettings.model_fields)
    settings = SAEBenchSettings.of(given)
    for name, field in SAEBenchSettings.model_fields.items():
        same = field.is_required() or getattr(settings, name) == field.get_default(call_default_factory=True)
        assert field.description and same, name


def test_what_cannot_be_evaluated_is_said_before_anything_starts(
    config: dict[str, Any], harvested: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="environment=nowhere has no SAEBench: make it with `make saebench`"):
        run_saebench({**config, "environment": "nowhere"})
    with pytest.raises(UserError, match="is a local model: evals=scr takes its data and the model from the hub"):
        run_saebench({**config, "evals": ["core", "scr"]})
    with pytest.raises(UserError, match="evals"):
        run_saebench({**config, "evals": ["autointerp"]})
    saved(tmp_path / "saes" / "over", rough_sae(16), harvested["store"], target="mlp_out.1")
    with pytest.raises(UserError, match="is a transcoder, and SAEBench evaluates autoencoders: leave it out"):
        run_saebench(config)
    assert not (tmp_path / "out").exists()


def test_a_site_or_model_that_it_cannot_read_is_said(
    config: dict[str, Any], harvested: dict[str, Any], tmp_path: Path
) -> None:
    (sae,) = find_saes(config["saes"])
    model = LanguageModel.of(harvested["config"]["model"])
    Group(harvested["store"], "resid_post.0", [sae], model).refuse()
    with pytest.raises(UserError, match=r"transformer\.h\.0 is a module's path, and SAEBench reads sites by"):
        Group(harvested["store"], "transformer.h.0", [sae], model).refuse()
    shutil.copytree(harvested["root"] / "lm", tmp_path / "lm", ignore=shutil.ignore_patterns("tokenizer*"))
    bare = LanguageModel.of({"name": str(tmp_path / "lm")})
    with pytest.raises(UserError, match="has no tokenizer, which SAEBench asks for: leave out its SAEs"):
        Group(harvested["store"], "resid_post.0", [sae], bare).refuse()


def test_a_hub_out_of_reach_is_said_before_anything_starts(harvested: dict[str, Any]) -> None:
    asked: list[str] = []

    def out_of_reach(name: str, revision: str | None) -> None:
        asked.append(name)
        raise UserError("the hub cannot be reached")

    group = Group(harvested["store"], "resid_post.0", [], LanguageModel.of({"name": "EleutherAI/pythia-160m-deduped"}))
    with pytest.raises(UserError, match=r"evals=tpp takes its data and .* needs neither .the hub cannot be reached."):
        ask_the_hub([group], ["core", "tpp"], out_of_reach)
    assert asked == ["EleutherAI/pythia-160m-deduped"]
    ask_the_hub([group], ["core"], out_of_reach)
    assert len(asked) == 1


def test_a_failure_inside_is_a_sentence(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"SAEBench failed in .*: its own message is above"):
        run_saebench(config)


def test_the_table_has_both_sides_and_what_parts_them() -> None:
    ours = {own: 1.5 for _, own, _, _ in ROWS}
    theirs = {name: 1.25 for _, _, name, _ in ROWS}
    said = table([{"sae": "one", "site": "resid_post.3", "ours": ours, "saebench": theirs}])
    assert "## one (resid_post.3)" in said and "| L0 | 1.50 | 1.25 | 0.25 |" in said
    assert "| cosine | 1.5000 | 1.2500 | 0.2500 |" in said and "Where the definitions differ" in said


def test_two_folders_of_one_name_get_two_names(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "sae one", tmp_path / "b" / "sae one"]
    assert list(distinct_names(folders).values()) == ["sae-one", "sae-one-2"]


@pytest.mark.slow
@inside
def test_without_special_tokens_both_agree(rough_sae: Callable[[int], ReLU], tmp_path: Path) -> None:
    """All rows but explained variance and KL, whose definitions differ; explained variance agrees by theirs."""
    made = harvest_of(tiny_gpt2(), tmp_path, bos="none")
    saved(tmp_path / "saes" / "rough", rough_sae(16), made["store"])
    own = {"saes": str(tmp_path / "saes"), "environment": str(PYTHON.parents[1]), "out": str(tmp_path / "out")}
    out = run_saebench(stage_config("saebench", cache=made["config"]["cache"], device="cpu", tokens=250, **own))
    (row,) = json.loads((out / "core.json").read_text())
    ours, theirs = row["ours"], row["saebench"]
    for _, mine, name, _ in ROWS:
        if mine not in ("ev", "kl"):
            assert ours[mine] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), mine
    assert ours["l0"] > 4 and abs(ours["ev"] - theirs["explained_variance"]) > 1e-3
    assert "| explained variance |" in (out / "core.md").read_text()


@pytest.mark.slow
@inside
def test_the_other_evaluations_take_what_they_are_given() -> None:
    """Their settings and calls, by their own schemas and signatures; they cannot be run without the hub."""
    code = """
import inspect
from benchmarks.saebench import inside
from benchmarks.saebench.inside import settings_of
job = {"model_name": "pythia-160m-deduped", "seed": 42, "batch": 16, "dtype": "float32", "device": "cpu"}
core = inspect.signature(inside.multiple_evals)
inside.multiple_evals = lambda **given: core.bind(**given)
inside.core_openwebtext(job, [], "out")
for name in ("sparse_probing", "absorption", "scr", "tpp"):
    module, settings = settings_of(name, job)
    inspect.signature(module.run_eval).bind(settings, [("one", None)], "cpu", "out")
    assert (settings.model_name, settings.random_seed, settings.llm_batch_size) == ("pythia-160m-deduped", 42, 16)
    print(name, getattr(settings, "perform_scr", None))
"""
    done = subprocess.run([str(PYTHON), "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sparse_probing", "None", "absorption", "None", "scr", "True", "tpp", "False"]
