"""A text of the user's own: what fires on it, and the way its words come through the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data.base.cli import CONF
from data.base.errors import UserError
from data.base.sites import Site
from evaluate.features.arguments import with_own_text
from evaluate.features.make import make
from harvest import lm
from harvest.hooks import run_to
from tests.helpers.settings import stage_config
from train.sae.io import save
from train.sae.variants.relu import ReLU


@pytest.fixture
def config(harvested: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path) -> dict[str, Any]:
    manifest = harvested["store"].manifest
    record = {"site": "resid_post.0", "fingerprint": manifest.fingerprint, "store": manifest.folder}
    save(rough_sae(16), tmp_path / "saes" / "rough", record)
    own = {"device": "cpu", "folder": str(tmp_path / "saes" / "rough"), "out": str(tmp_path / "out")}
    return stage_config("features", cache=harvested["config"]["cache"], **own)


def test_the_page_has_every_firing_on_the_text(
    config: dict[str, Any], harvested: dict[str, Any], rough_sae: Callable[[int], ReLU]
) -> None:
    path = make({**config, "own_text": "w3 w14 w15 w9"})
    html = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="page">(.*?)</script>', html)
    assert path.name == "text.html" and found
    page = json.loads(found[1])
    tokenizer = lm.load_tokenizer(harvested["config"]["model"])
    ids = [tokenizer.bos_token_id, *tokenizer("w3 w14 w15 w9", add_special_tokens=False)["input_ids"]]
    assert [page["tokens"][i] for i in page["ids"]] == [tokenizer.decode([i]) for i in ids]
    assert page["read"] == [1, 2, 3, 4]  # the BOS is not one of the rows that the SAE was trained on
    model = lm.load_model(harvested["config"]["model"])
    x_TD = run_to(model, [Site.parse("resid_post.0")], torch.tensor([ids]))["resid_post.0"][0]
    f_NF = rough_sae(16).encode(x_TD[1:]).detach()
    fired = {one["i"]: dict(zip(one["a"][::2], one["a"][1::2], strict=True)) for one in page["latents"]}
    assert set(fired) == set((f_NF > 0).any(0).nonzero()[:, 0].tolist())
    for latent, values in fired.items():
        expected = {place + 1: value for place, value in enumerate(f_NF[:, latent].tolist()) if value > 0}
        assert values == pytest.approx(expected, rel=6e-3)  # three digits
    assert all(len(one["r"]) == 4 for one in page["latents"])


def test_a_text_is_markup_nowhere(config: dict[str, Any]) -> None:
    html = make({**config, "own_text": "<script>window.hacked=1</script> w1"}).read_text(encoding="utf-8")
    assert html.count("<script") == 2 and "window.hacked" not in html.replace("\\u003c", "<").split("<header>")[0]


@pytest.mark.parametrize(
    "text, sentence", [("", "no token that the SAE would read"), ("w1 " * 16, "text fills 2 contexts of 16 tokens")]
)
def test_what_cannot_be_shaded(config: dict[str, Any], text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make({**config, "own_text": text})


@pytest.mark.parametrize(
    "text",
    ["plain words", "it's [a] {b}: c, d=e", "a\\b\\", "q\\'x", "two\nlines", "${oc.env:HOME} \\${x}", "", "é 日本 % #"],
)
def test_any_words_come_through_the_command_line(text: str) -> None:
    given = with_own_text([f"text={text}", "text.field=body", "top=3"])
    assert given[1:] == ["text.field=body", "top=3"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = OmegaConf.to_container(compose("features", [*given, "out=x"]), resolve=True)
    assert isinstance(composed, dict) and composed["own_text"] == text
