"""The user's own held-out text: scored in place of the store's, and refused where it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.base.errors import UserError
from evaluate.inputs import HeldoutText, open_text
from evaluate.run import evaluate
from harvest.documents import HELDOUT, TRAIN, split_of
from harvest.packing import PackedTokens
from tests.helpers.settings import stage_config
from train.sae.io import save
from train.sae.variants.relu import ReLU


def a_text(path: Path, seed: int, documents: int = 12) -> Path:
    """Documents of the store's vocabulary that the store does not have."""
    rng = np.random.default_rng(seed)
    lines = [{"body": " ".join(f"w{i}" for i in rng.integers(0, 80, 40))} for _ in range(documents)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(harvested: dict[str, Any], tmp_path: Path, *paths: Path) -> dict[str, Any]:
    own = {"saes": str(tmp_path / "saes"), "cache": harvested["config"]["cache"], "out": str(tmp_path / "out")}
    text = {"paths": [str(path) for path in paths], "field": "body"}
    return stage_config("evaluate", **own, tokens=300, bootstrap=10, device="cpu", text=text)


@pytest.fixture
def saved(harvested: dict[str, Any], tmp_path: Path, rough_sae: Callable[[int], ReLU]) -> None:
    record = {"site": "resid_post.0", "fingerprint": harvested["store"].manifest.fingerprint, "store": "s"}
    save(rough_sae(16), tmp_path / "saes" / "rough", record)


def test_saes_in_shards_are_found_and_scored_alike(
    harvested: dict[str, Any], tmp_path: Path, rough_sae: Callable[[int], ReLU]
) -> None:
    record = {"site": "resid_post.0", "fingerprint": harvested["store"].manifest.fingerprint, "store": "s"}
    for name, most in (("many", 500), ("one", 10**9)):
        save(rough_sae(16), tmp_path / "saes" / name, record, shard_bytes=most)
    report = evaluate(config_of(harvested, tmp_path, a_text(tmp_path / "own.jsonl", 5))).path.with_name("report.json")
    (site,) = json.loads(report.read_text())["sites"]
    many, one = site["saes"]
    assert Path(many["folder"]).name == "many" and many["metrics"] == one["metrics"]


def test_own_text_is_what_is_scored(
    saved: None, harvested: dict[str, Any], tmp_path: Path, rough_sae: Callable[[int], ReLU]
) -> None:
    config = config_of(harvested, tmp_path, a_text(tmp_path / "own.jsonl", 5))
    text = open_text(harvested["store"], config)
    assert len(text.packed.names) == 8
    path = evaluate(config).path
    (site,) = json.loads((path.parent / "report.json").read_text())["sites"]
    assert site["text"]["documents"] == 12 and site["documents"] == 8 and site["split"] == "own text"
    from harvest.hooks import Site, run_to

    ids, keep = torch.from_numpy(text.packed.contexts).long(), torch.from_numpy(text.packed.keep)
    x = run_to(text.model, [Site.parse("resid_post.0")], ids)["resid_post.0"][keep].double()
    x_hat = rough_sae(16)(x.float()).detach().double()
    expected = float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert site["saes"][0]["metrics"]["nmse"]["value"] == pytest.approx(expected, rel=1e-5)
    assert "the user's own" in path.read_text()


def test_a_document_of_the_training_split_is_refused(saved: None, harvested: dict[str, Any], tmp_path: Path) -> None:
    texts = [path.read_text() for path in sorted((harvested["root"] / "text").glob("*.txt"))]
    by_split = {split: [text for text in texts if split_of(text, 0.3) == split] for split in (TRAIN, HELDOUT)}
    path = a_text(tmp_path / "own.jsonl", 5)
    with path.open("a") as file:
        file.write(json.dumps({"body": by_split[HELDOUT][0]}) + "\n")
    open_text(harvested["store"], config_of(harvested, tmp_path, path))  # held out there, so held out here
    with path.open("a") as file:
        file.write(json.dumps({"body": by_split[TRAIN][0]}) + "\n")
    with pytest.raises(UserError, match=r"1 of 14 documents of text.paths, such as .*own.jsonl:14, are in the text"):
        evaluate(config_of(harvested, tmp_path, path))
    assert not (tmp_path / "out").exists()


def test_own_text_that_cannot_be_read_is_said(saved: None, harvested: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere"):
        evaluate(config_of(harvested, tmp_path, tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match=r"tokens=300 cannot be scored"):
        evaluate(config_of(harvested, tmp_path, a_text(tmp_path / "short.jsonl", 6, documents=2)))


def test_batches_are_all_contexts_in_order(tiny_lm: Any) -> None:
    ids = np.arange(50, dtype=np.int32).reshape(10, 5)
    text = HeldoutText(tiny_lm, PackedTokens(ids, ids % 2 == 0), None, 4)
    batches = list(text.batches())
    assert [batch.numbers for batch in batches] == [range(4), range(4, 8), range(8, 10)]
    np.testing.assert_array_equal(torch.cat([batch.ids_BT for batch in batches]).numpy(), ids)
    np.testing.assert_array_equal(torch.cat([batch.keep_BT for batch in batches]).numpy(), ids % 2 == 0)
    assert [batch.numbers for batch in text.batches(range(3, 8))] == [range(3, 7), range(7, 8)]
