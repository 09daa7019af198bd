"""python -m pytest tests/harvest/test_split_model.py: models that two processes run, or that lie on several devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from data.base.errors import UserError
from data.store.manifest import TRAIN
from data.store.store import Store
from evaluate.result import Report
from evaluate.run import evaluate
from harvest.lm import load_model
from harvest.run import harvest
from tests.helpers.corpus import ROOT, WIDTH, config, contents, save_model, write_stories
from tests.helpers.settings import stage_config
from tests.helpers.tiny_lm import rough_sae
from train.plan import origin
from train.sae import save
from train.sae.variants.relu import ReLU

__all__ = ["rough_sae"]

STREAM = "sites=[resid_post.1,mlp_in.2,attn_out.0]"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("texts") / "stories.jsonl", range(40))


def split(model: Path, text: Path, cache: Path, *overrides: str) -> dict[str, Any]:
    return config(model, text, cache, "model.device=auto", "model.tp_plan=auto", STREAM, *overrides)


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *command,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def one(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store that one process makes."""
    return harvest(config(model, text, tmp_path_factory.mktemp("one"), STREAM, "tokens=300"))


@pytest.fixture(scope="module")
def trained(one: Store, rough_sae: Callable[[int], ReLU], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an SAE of that store."""
    folder = tmp_path_factory.mktemp("saes") / "rough"
    save(rough_sae(WIDTH), folder, origin(one, "resid_post.1"))
    return folder


@pytest.fixture(scope="module")
def outcomes(
    model: Path, text: Path, one: Store, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What two processes made of several harvests, one after another: {name: store's path or refusal}."""
    root = tmp_path_factory.mktemp("split")
    gpt2 = save_model(root / "gpt2")
    scored = {"saes": str(trained.parent), "cache": str(one.path.parent), "tokens": 60, "bootstrap": 10}
    calls = {
        "first": split(model, text, root / "cache"),
        "more": split(model, text, root / "cache", "tokens=300"),
        "again": split(model, text, root / "cache", "tokens=300"),
        "int8": split(model, text, root / "int8", "store.encoding=int8"),
        "part of a tensor": split(model, text, root / "parts", "sites=[model.layers.1.mlp.up_proj]"),
        "no plan": split(gpt2, text, root / "gpt2-cache"),
        "scores": stage_config("evaluate", out=str(root / "scores"), tp_plan="auto", **scored),
    }
    stages = [["evaluate" if name == "scores" else "harvest", call] for name, call in calls.items()]
    (root / "calls.json").write_text(json.dumps(stages))
    done = torchrun(2, "tests/helpers/split_model.py", str(root / "calls.json"), str(root / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    by_rank = [json.loads(Path(f"{root}/out.{rank}").read_text()) for rank in range(2)]
    assert by_rank[0] == by_rank[1]
    return {**dict(zip(calls, by_rank[0], strict=True)), "said": done.stdout}


@pytest.mark.slow
def test_two_processes_make_the_rows_of_one(outcomes: dict[str, Any], one: Store) -> None:
    two = Store.open(Path(outcomes["more"]))
    assert outcomes["first"] == outcomes["more"] == outcomes["again"]
    assert outcomes["said"].count("nothing to do") == 1
    for site in one.sites(TRAIN):
        expected, split_up = (zarr.open_array(store.path / TRAIN / site, mode="r")[:] for store in (one, two))
        assert expected.std() > 0.1
        np.testing.assert_allclose(split_up, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_store_says_over_how_many_processes_its_model_was_split(outcomes: dict[str, Any]) -> None:
    store = Store.open(Path(outcomes["more"]))
    assert store.manifest.identity["tensor_parallel"] == 2
    assert {c.made_by["tensor_parallel"] for c in store.committed(TRAIN, "resid_post.1").values()} == {2}
    assert "tp_plan" not in store.manifest.settings["model"]


@pytest.mark.slow
def test_a_store_that_a_split_model_began_is_not_gone_on_with_by_one_process(
    outcomes: dict[str, Any], model: Path, text: Path
) -> None:
    cache = Path(outcomes["more"]).parent
    asked = (STREAM, "tokens=400")
    with pytest.raises(UserError, match=r"was begun elsewhere \(.*tensor_parallel"):
        harvest(config(model, text, cache, *asked))
    store = harvest(config(model, text, cache, *asked, "allow_mixed_devices=true"))
    assert str(store.path) == outcomes["more"]


@pytest.mark.slow
def test_two_processes_score_as_one_does(outcomes: dict[str, Any], one: Store, trained: Path, tmp_path: Path) -> None:
    scored = {"saes": str(trained), "cache": str(one.path.parent), "tokens": 60, "bootstrap": 10, "device": "cpu"}
    alone = evaluate(stage_config("evaluate", out=str(tmp_path / "alone"), **scored))
    by_two = Report(Path(outcomes["scores"]))
    for name, metric in alone.content["sites"][0]["saes"][0]["metrics"].items():
        assert by_two.content["sites"][0]["saes"][0]["metrics"][name]["value"] == pytest.approx(
            metric["value"], rel=1e-3, abs=1e-5
        ), name
    assert by_two.page.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "device_map",
    [
        {"": "disk"},
        {
            **{"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"},
            **{"model.layers.2": "cpu", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"},
        },
    ],
)
def test_layers_that_wait_on_disk_make_the_same_bytes_and_scores(
    model: Path, text: Path, one: Store, trained: Path, tmp_path: Path, device_map: dict[str, str]
) -> None:
    pytest.importorskip("accelerate")
    asked = config(model, text, tmp_path, STREAM, "tokens=300", "model.device=auto")
    asked["model"]["device_map"] = device_map
    store = harvest(asked)
    assert contents(store.path) == contents(one.path)
    scored = {"saes": str(trained), "cache": str(one.path.parent), "tokens": 60, "bootstrap": 10}
    plain = evaluate(stage_config("evaluate", out=str(tmp_path / "plain"), device="cpu", **scored))
    spread = evaluate(stage_config("evaluate", out=str(tmp_path / "spread"), device_map=device_map, **scored))
    assert spread.content["sites"][0]["saes"][0]["metrics"] == plain.content["sites"][0]["saes"][0]["metrics"]


@pytest.mark.slow
def test_int8_scales_are_measured_by_both(outcomes: dict[str, Any]) -> None:
    store = Store.open(Path(outcomes["int8"]))
    assert store.rows_of("resid_post.1").standard is not None


@pytest.mark.slow
def test_what_cannot_be_split_is_refused_in_a_sentence(outcomes: dict[str, Any]) -> None:
    assert "each process has a part of this tensor only" in outcomes["part of a tensor"]
    assert "transformers has no plan by which to split gpt2 models" in outcomes["no plan"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "cpu"}, "model.device and model.tp_plan are both set"),
        ({"device_map": "auto"}, "model.device_map and model.tp_plan are both set"),
        ({"tp_plan": "mine"}, "model.tp_plan=mine is not allowed"),
    ],
)
def test_settings_that_contradict_a_plan_are_refused(model: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_model({"name": str(model), "tp_plan": "auto", **settings})


def test_a_plan_needs_processes(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="this one is alone: start it with torchrun --nproc-per-node N"):
        harvest(split(model, text, tmp_path))


def test_heads_that_processes_cannot_share_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes cannot share the 4 key and value heads"):
        load_model({"name": str(model), "tp_plan": "auto"})
