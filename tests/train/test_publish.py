"""`python -m train.publish`: what goes, in SAELens' layout, and nothing without go=true; the token is never shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base.cli import CONF
from data.base.errors import UserError
from tests.helpers.hub import Hub, serving
from train.interop.saelens import read
from train.publish import PublishSettings, prepare_upload
from train.sae import load, save
from train.sae.variants.topk import TopK

TOKEN = "hf_not_a_real_token_0123456789"
RECORD = {
    "site": "resid_post.3",
    "fingerprint": "f" * 64,
    "store": "tiny-ffffffffffff",
    "model_name": "tiny",
    "packing": {"context": 16, "bos": "document"},
    "training": {"tokens": 1000, "heldout": {"nmse": 0.12345, "l0": 4.0, "tokens": 100, "silent": 0}},
}


@pytest.fixture
def saes(tmp_path: Path) -> Path:
    """A sweep of two SAEs."""
    for k in (2, 4):
        save(TopK(8, 32, k=k), tmp_path / "saes" / f"sae.k-{k}", RECORD)
    return tmp_path / "saes"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(TOKEN) as running:
        yield running


def publish(hub: Hub, home: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | own
    command = [sys.executable, "-m", "train.publish", *arguments]
    return subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, env=environment)


def test_an_sae_in_shards_goes_as_one_file(saes: Path, tmp_path: Path) -> None:
    settings = {"saes": str(saes), "repo": "me/topk"}
    before = prepare_upload(PublishSettings.of(settings)).files
    for folder in saes.iterdir():
        save(load(folder), folder, RECORD, shard_bytes=500)
        assert len(list(folder.glob("sae-*.safetensors"))) > 2
    assert prepare_upload(PublishSettings.of(settings)).files == before


@pytest.mark.slow
def test_nothing_goes_unasked_and_then_all_of_it(saes: Path, hub: Hub, tmp_path: Path) -> None:
    dry = publish(hub, tmp_path / "home", f"saes={saes}", "repo=me/topk")
    assert dry.returncode == 0, dry.stderr
    assert "  sae.k-2/sae_weights.safetensors" in dry.stdout
    assert "7 files" in dry.stdout
    assert "nothing was sent: give go=true" in dry.stdout
    assert hub.asked == []
    sent = publish(hub, tmp_path / "home", f"saes={saes}", "repo=me/topk", "go=true", "message=First")
    assert sent.returncode == 0, sent.stderr
    assert f"{hub.url}/me/topk/commit/" in sent.stdout
    assert (hub.private, hub.messages) == ({"me/topk": True}, ["First"])
    assert TOKEN not in sent.stdout + sent.stderr
    files = hub.repos["me/topk"]
    parts = ("README.md", "cfg.json", "sae_weights.safetensors")
    assert files.keys() == {"README.md", *(f"sae.k-{k}/{part}" for k in (2, 4) for part in parts)}
    # What SAELens would read from the repository is the SAE.
    (tmp_path / "there").mkdir()
    for part in parts:
        (tmp_path / "there" / part).write_bytes(files[f"sae.k-4/{part}"])
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(read(tmp_path / "there").sae.encode(x), load(saes / "sae.k-4").encode(x))
    card = files["README.md"].decode()
    assert 'SAE.from_pretrained("me/topk", "sae.k-2")' in card
    assert "| [sae.k-4](sae.k-4) | topk | resid_post.3 | 32 | 4.0 | 0.1235 |" in card
    assert card.startswith("---\nlicense: mit\n")


@pytest.mark.slow
def test_a_refusal_is_one_sentence_without_the_token(saes: Path, hub: Hub, tmp_path: Path) -> None:
    wrong = "hf_wrong_token_987654321"
    done = publish(hub, tmp_path / "home", f"saes={saes}", "repo=me/topk", "go=true", token=wrong)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the hub refuses me/topk (401): set HF_TOKEN")
    assert len(done.stderr.splitlines()) == 1
    assert wrong not in done.stdout + done.stderr
    assert hub.repos == {}
    hub.url = "http://127.0.0.1:9"  # where nothing listens
    lost = publish(hub, tmp_path / "home", f"saes={saes}", "repo=me/topk", "go=true")
    assert lost.stderr == "error: the hub cannot be reached (ConnectError): check the network and HF_ENDPOINT\n"


def test_the_report_and_its_pages_go_with_it(saes: Path, tmp_path: Path) -> None:
    report, plots, features = tmp_path / "out", tmp_path / "out" / "plots", tmp_path / "out" / "features"
    for folder in (report, plots, features, features / "other"):
        folder.mkdir()
    names = ("l0", "nmse", "ev", "ce_increase", "recovered_zero", "recovered_mean", "kl")
    metrics = {name: {"value": 0.5, "se": 0.1} for name in names}
    rows = [{"folder": str(path), "metrics": metrics} for path in sorted(saes.iterdir())]
    site = {"fingerprint": "f" * 64, "tokens": 77, "sequences": 5, "saes": rows}
    (report / "report.json").write_text(json.dumps({"sites": [site]}))
    for name in (
        "report.html",
        "plots/a.png",
        "features/index.html",
        "features/part-000.js",
        "features/other/index.html",
        "x.log",
    ):
        (report / name).write_text("x")
    upload = prepare_upload(settings(saes=str(saes), repo="me/topk", report=str(report)))
    beside = {path for path in upload.files if path.startswith("report/")}
    pages = ("report.json", "report.html", "plots/a.png", "features/index.html", "features/part-000.js")
    pages += ("features/other/index.html",)  # of the SAE that the pages compare with
    assert beside == {f"report/{name}" for name in pages}
    assert "On 77 held-out tokens" in bytes(upload.files["sae.k-2/README.md"]).decode()
    assert [line for line in upload.listing() if "features/ (3 files)" in line]


def settings(**given: Any) -> PublishSettings:
    return PublishSettings.of(given)


def test_mistakes_are_sentences(saes: Path, tmp_path: Path) -> None:
    for given, sentence in [
        ({"saes": str(saes), "repo": "topk"}, "repo=topk is no repository of the hub: give one as repo=owner/name"),
        ({"repo": "me/topk"}, "saes is not set: name the folder"),
        ({"saes": str(tmp_path / "no"), "repo": "me/topk"}, f"saes={tmp_path / 'no'} holds no trained SAE"),
        ({"saes": str(saes), "repo": "me/topk", "report": "no"}, "report=no holds no report.json"),
    ]:
        with pytest.raises(UserError) as caught:
            prepare_upload(settings(**given))
        assert str(caught.value).startswith(sentence)
    save(TopK(8, 32, k=2), tmp_path / "other" / "sae.k-2", RECORD)
    with pytest.raises(UserError, match=r"would both be sae\.k-2 in the repository: rename one"):
        prepare_upload(settings(saes=[str(saes), str(tmp_path / "other")], repo="me/topk"))
