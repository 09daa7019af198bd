"""A text of one's own: the tokens, contexts and activations are those of a harvest, and steering moves the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from IPython.core.formatters import MarkdownFormatter

import evaluate
from data import UserError
from data.base.sites import Site
from harvest.documents import FilesText
from harvest.hooks import run_to
from harvest.lm import load_tokenizer
from harvest.packing import Packing, pack
from tests.helpers.tiny_lm import SITE
from train.plan import origin
from train.sae import load
from train.sae.io import save
from train.sae.variants.relu import ReLU


@pytest.fixture
def folder(harvested: dict[str, Any], identity_sae: Callable[[int], ReLU], tmp_path: Path) -> Path:
    save(identity_sae(16), tmp_path / "sae", origin(harvested["store"], SITE))
    return tmp_path / "sae"


def repacked(folder: Path, **packing: Any) -> Path:
    """The same SAE, its record with another packing."""
    config = json.loads((folder / "config.json").read_text())
    config["packing"] |= packing
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_of(folder: Path) -> dict[str, Any]:
    """The settings of the model in the SAE's record, on the CPU."""
    return dict(json.loads((folder / "config.json").read_text())["model"]) | {"device": "cpu"}


TEXT = " ".join(f"w{i % 80}" for i in range(0, 301, 7))  # 43 words


@pytest.mark.parametrize("bos", ["context", "document", "none"])
def test_contexts_are_those_of_a_harvest(bos: str, folder: Path, tiny_lm: Any, tmp_path: Path) -> None:
    encoded = evaluate.encode_text(repacked(folder, bos=bos), TEXT, device="cpu")
    (tmp_path / "own.txt").write_text(TEXT)
    packing = Packing.of({"context": 16, "bos": bos, "heldout": 0.0, "shuffle": None})
    tokenizer = load_tokenizer(model_of(folder))
    packed = pack(FilesText(paths=[str(tmp_path / "own.txt")]), tokenizer, packing, "train", 30)
    whole = packed.contexts[packed.keep]
    assert encoded.tokens[: len(whole)].tolist() == whole.tolist()
    assert [text.strip() for text in encoded.strings] == TEXT.split()
    ids = torch.from_numpy(packed.contexts.astype(np.int64))
    x = run_to(tiny_lm, [Site.parse(SITE)], ids)[SITE][torch.from_numpy(packed.keep)]
    torch.testing.assert_close(encoded.x[: len(whole)], x)
    # The identity SAE's latents are the positive and the negative parts of x.
    assert torch.equal(encoded.latents, torch.cat([encoded.x.relu(), (-encoded.x).relu()], 1))


def test_the_strongest_latents_are_named_with_their_token(folder: Path) -> None:
    encoded = evaluate.encode_text(load(folder), "w1 w2 w3", device="cpu")
    (latent, value, string), *_ = encoded.strongest(3)
    assert value == float(encoded.latents.max())
    assert float(encoded.latents[encoded.strings.index(string), latent]) == value


def test_strength_zero_is_the_model_itself_and_a_large_one_is_not(folder: Path, tiny_lm: Any) -> None:
    sae, tokenizer = load(folder), load_tokenizer(model_of(folder))
    ids = torch.tensor([[0, *tokenizer("w5 w6", add_special_tokens=False)["input_ids"]]])
    for _ in range(6):
        ids = torch.cat([ids, tiny_lm(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    plain = tokenizer.decode(ids[0, 3:].tolist())
    assert evaluate.steer_text(sae, "w5 w6", 3, 0.0, tokens=6, device="cpu") == plain
    pushed = {evaluate.steer_text(sae, "w5 w6", latent, 50.0, tokens=6, device="cpu") for latent in range(16)}
    assert pushed - {plain}


def test_mistakes_are_sentences(folder: Path, identity_sae: Callable[[int], ReLU]) -> None:
    with pytest.raises(UserError, match="has no record of its site: load it with"):
        evaluate.encode_text(identity_sae(16), "w1")
    with pytest.raises(UserError, match="the text has no tokens"):
        evaluate.encode_text(folder, "", device="cpu")
    with pytest.raises(UserError, match="latent=32 is none of the SAE's: choose one from 0 to 31"):
        evaluate.steer_text(folder, "w1", 32, 1.0, device="cpu")
    with pytest.raises(UserError, match="a prompt of 3 tokens and 40 more do not fit a context of 16"):
        evaluate.steer_text(folder, "w1 w2", 1, 1.0, device="cpu")


def test_a_report_has_its_numbers_as_rows(harvested: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    own = {"cache": harvested["config"]["cache"], "device": "cpu", "out": tmp_path / "out"}
    report = evaluate.evaluate(saes=folder, tokens=250, bootstrap=10, **own)
    (row,) = report.rows()
    assert (row["site"], row["variant"], row["folder"], row["width"]) == (SITE, "relu", str(folder), 32)
    assert row["nmse"] < 1e-4
    assert row["ce_increase_se"] >= 0
    assert report.page.is_file()
    assert MarkdownFormatter()(report) == report.path.read_text() == Path(report).read_text()
