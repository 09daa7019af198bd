"""`python -m evaluate.features` from a saved SAE to its pages, and the sentences for what a user can get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.base.errors import UserError
from data.loading.reader import open_reader
from evaluate.features.make import make, one_sae
from evaluate.run import evaluate
from tests.helpers.settings import stage_config
from train.sae.io import save
from train.sae.variants.relu import ReLU


@pytest.fixture
def config(harvested: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path) -> dict[str, Any]:
    manifest = harvested["store"].manifest
    record = {"site": "resid_post.0", "fingerprint": manifest.fingerprint, "store": manifest.folder}
    save(rough_sae(16), tmp_path / "saes" / "rough", record)
    own = {"device": "cpu", "tokens": 250, "folder": str(tmp_path / "saes" / "rough"), "out": str(tmp_path / "out")}
    return stage_config("features", cache=harvested["config"]["cache"], **own)


def index_of(path: Path) -> dict[str, Any]:
    text = (path.parent / "index.js").read_text()
    found: dict[str, Any] = json.loads(text[len("thresher.index(") : -len(");\n")])
    return found


def test_the_figures_are_those_of_the_stores_held_out_rows(
    config: dict[str, Any], harvested: dict[str, Any], rough_sae: Callable[[int], ReLU]
) -> None:
    store = harvested["store"]
    config["tokens"] = rows = store.rows("heldout", "resid_post.0")
    reader = open_reader(store, "heldout", "resid_post.0")
    parts = []
    for chunk, size in enumerate(reader.sizes):
        out = np.empty((store.layout.chunk_rows, 16), dtype=np.uint16)
        reader.read(chunk, out)
        parts.append(torch.from_numpy(out[:size].view(np.int16)).view(torch.bfloat16))
    f = rough_sae(16).encode(torch.cat(parts).float()).detach()
    index = index_of(make(config))
    # The store rounds to bfloat16, so a few activations near 0 may be on its other side.
    assert np.abs(np.array(index["fired"]) - (f > 0).sum(0).numpy()).max() <= 0.02 * rows
    np.testing.assert_allclose(index["max"], f.amax(0).numpy(), rtol=0.05, atol=0.05)


def test_neither_the_batch_nor_the_chunk_changes_the_pages(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = index_of(make(config))
    monkeypatch.setattr("evaluate.score.ACTIVATIONS_AT_ONCE", 1)
    other = index_of(make(config | {"lm_batch": 3}))
    assert np.abs(np.array(one["fired"]) - other["fired"]).max() <= 1 and one["peaks"] == other["peaks"]
    np.testing.assert_allclose(one["max"], other["max"], rtol=2e-3)


def test_a_site_that_is_no_part_of_the_stream_has_no_logits(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert index_of(make(config))["raised"] is not None
    monkeypatch.setattr("evaluate.features.weights.find_lens", lambda model, d_in: None)
    path = make(config)
    assert index_of(path)["raised"] is None
    assert "not shown: this site" in path.read_text()
    assert '"r":' not in (path.parent / "part-000.js").read_text()


@pytest.mark.slow
def test_an_evaluation_puts_them_beside_its_report(config: dict[str, Any], tmp_path: Path) -> None:
    own = stage_config("evaluate", saes=config["folder"], tokens=250, bootstrap=10, features="rough")
    report = evaluate(own | {name: config[name] for name in ("cache", "device", "out")}).path
    page = report.parent / "features" / "index.html"
    found = json.loads((report.parent / "report.json").read_text())["sites"][0]["saes"][0]
    assert index_of(page)["fired"] == found["l0"]["fired"]
    assert 'href="../report.html"' in page.read_text()
    assert 'href="features/index.html"' in (report.parent / "report.html").read_text()
    with pytest.raises(UserError, match="features=other is none of the SAEs"):
        evaluate({**own, "features": "other", "cache": config["cache"], "device": "cpu", "out": str(tmp_path / "none")})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"folder": None}, "folder is empty"),
        ({"folder": "nowhere"}, "^folder=nowhere holds no trained SAE"),
        ({"compare": "nowhere"}, "^compare=nowhere holds no trained SAE"),
        ({"tokens": 10**9}, "tokens=1,000,000,000 cannot be scored"),
        ({"top": 0}, "top=0 is not allowed: it should be greater than or equal to 1"),
        ({"quantiles": [0.5, 0.9]}, "must be falling numbers"),
        ({"quantiles": "half"}, "quantiles=half is not allowed"),
        ({"lm_batch": 0}, "lm_batch=0"),
    ],
)
def test_what_a_user_can_get_wrong(config: dict[str, Any], wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make(config | wrong)
    assert not Path(config["out"]).exists()


def test_one_of_several_must_be_named(config: dict[str, Any], rough_sae: Callable[[int], ReLU]) -> None:
    folder = Path(config["folder"])
    save(rough_sae(16), folder.parent / "second", json.loads((folder / "config.json").read_text()))
    with pytest.raises(UserError, match="holds 2 SAEs: name the folder of one, such as"):
        one_sae(str(folder.parent))


def test_two_saes_of_a_site_are_compared_by_their_decoder_rows(
    config: dict[str, Any], rough_sae: Callable[[int], ReLU], identity_sae: Callable[[int], ReLU]
) -> None:
    folder = Path(config["folder"])
    whole = json.loads((folder / "config.json").read_text())
    record = {name: whole[name] for name in ("site", "fingerprint", "store")}
    save(identity_sae(16), folder.parent / "plain", record)
    path = make({**config, "compare": str(folder.parent / "plain"), "neighbours": 2})
    piece = json.loads(f"[{(path.parent / 'part-000.js').read_text()[len('thresher.piece(') : -3]}]")[1]
    one, other = rough_sae(16).W_dec.detach(), identity_sae(16).W_dec.detach()
    cosine = torch.nn.functional.cosine_similarity(one[:, None], other[None], dim=-1)
    for latent, page in enumerate(piece["latents"]):
        expected, ids = cosine[latent].topk(2)
        assert [found[0] for found in page["x"]] == ids.tolist()
        assert [found[1] for found in page["x"]] == pytest.approx(expected.tolist(), abs=6e-4)
    assert len(index_of(path.parent / "other" / "index.html")["fired"]) == 32
    assert "relu in plain" in path.read_text()


def test_an_sae_of_another_site_is_not_compared(config: dict[str, Any], rough_sae: Callable[[int], ReLU]) -> None:
    folder = Path(config["folder"])
    record = {**json.loads((folder / "config.json").read_text()), "site": "mlp_out.1"}
    save(rough_sae(16), folder.parent / "elsewhere", record)
    with pytest.raises(UserError, match="is of another store or site"):
        make({**config, "compare": str(folder.parent / "elsewhere")})
