"""python -m pytest tests/harvest/test_split_model.py: models that two processes run together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from data.base.errors import UserError
from data.store.manifest import TRAIN
from data.store.store import Store
from harvest.run import harvest
from tests.helpers.corpus import ROOT, config, save_model, write_stories

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
def outcomes(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes made of several harvests, one after another: {name: store's path or refusal}."""
    root = tmp_path_factory.mktemp("split")
    gpt2 = save_model(root / "gpt2")
    calls = {
        "first": split(model, text, root / "cache"),
        "more": split(model, text, root / "cache", "tokens=300"),
        "again": split(model, text, root / "cache", "tokens=300"),
        "int8": split(model, text, root / "int8", "store.encoding=int8"),
        "part of a tensor": split(model, text, root / "parts", "sites=[model.layers.1.mlp.up_proj]"),
        "no plan": split(gpt2, text, root / "gpt2-cache"),
    }
    (root / "calls.json").write_text(json.dumps([["harvest", call] for call in calls.values()]))
    done = torchrun(2, "tests/helpers/split_model.py", str(root / "calls.json"), str(root / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    by_rank = [json.loads(Path(f"{root}/out.{rank}").read_text()) for rank in range(2)]
    assert by_rank[0] == by_rank[1]
    return {**dict(zip(calls, by_rank[0], strict=True)), "said": done.stdout}


def test_two_processes_make_the_rows_of_one(outcomes: dict[str, Any], model: Path, text: Path, tmp_path: Path) -> None:
    one = harvest(config(model, text, tmp_path, STREAM, "tokens=300"))
    two = Store.open(Path(outcomes["more"]))
    assert outcomes["first"] == outcomes["more"] == outcomes["again"]
    assert outcomes["said"].count("nothing to do") == 1
    for site in one.sites(TRAIN):
        expected, split_up = (zarr.open_array(store.path / TRAIN / site, mode="r")[:] for store in (one, two))
        assert expected.std() > 0.1
        np.testing.assert_allclose(split_up, expected, rtol=1e-4, atol=1e-5)


def test_a_store_says_over_how_many_processes_its_model_was_split(outcomes: dict[str, Any]) -> None:
    store = Store.open(Path(outcomes["more"]))
    assert store.manifest.identity["tensor_parallel"] == 2
    assert {c.made_by["tensor_parallel"] for c in store.committed(TRAIN, "resid_post.1").values()} == {2}
    assert "tp_plan" not in store.manifest.settings["model"]


def test_a_store_that_a_split_model_began_is_not_gone_on_with_by_one_process(
    outcomes: dict[str, Any], model: Path, text: Path
) -> None:
    cache = Path(outcomes["more"]).parent
    asked = (STREAM, "tokens=400")
    with pytest.raises(UserError, match=r"was begun elsewhere \(.*tensor_parallel"):
        harvest(config(model, text, cache, *asked))
    store = harvest(config(model, text, cache, *asked, "allow_mixed_devices=true"))
    assert str(store.path) == outcomes["more"]


def test_int8_scales_are_measured_by_both(outcomes: dict[str, Any]) -> None:
    store = Store.open(Path(outcomes["int8"]))
    assert store.rows_of("resid_post.1").standard is not None


def test_what_cannot_be_split_is_refused_in_a_sentence(outcomes: dict[str, Any]) -> None:
    assert "each process has a part of this tensor only" in outcomes["part of a tensor"]
    assert "transformers has no plan by which to split gpt2 models" in outcomes["no plan"]
