"""`python -m evaluate` from saved SAEs to the report, and the sentences for what a user can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from data.loading.reader import open_reader
from data.store.manifest import Manifest
from data.store.store import Store
from evaluate.inputs import find_saes, pinned
from evaluate.run import evaluate
from tests.helpers.settings import stage_config
from train.sae.base import SAE
from train.sae.io import save
from train.sae.variants.relu import ReLU

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def saved(harvested: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Saves an SAE as training does; `record` overrides its record."""

    def make(name: str, sae: SAE, **record: Any) -> Path:
        manifest = harvested["store"].manifest
        known = {"site": "resid_post.0", "fingerprint": manifest.fingerprint, "store": manifest.folder}
        training = {"tokens": 1000, "seed": 0, "dead": 2, "dead_after": 100}
        save(
            sae, tmp_path / "saes" / name, known | {"model": manifest.settings["model"], "training": training} | record
        )
        return tmp_path / "saes" / name

    return make


@pytest.fixture
def config(harvested: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    own = {"tokens": 250, "bootstrap": 50, "device": "cpu", "out": str(tmp_path / "out")}
    return stage_config("evaluate", saes=str(tmp_path / "saes"), cache=harvested["config"]["cache"], **own)


def results(config: dict[str, Any]) -> dict[str, Any]:
    path = evaluate(config).path
    found: dict[str, Any] = json.loads((path.parent / "report.json").read_text())
    return found


def test_several_saes_of_two_sites(
    saved: Callable[..., Path],
    config: dict[str, Any],
    harvested: dict[str, Any],
    identity_sae: Callable[[int], ReLU],
    constant_sae: Callable[[Tensor], ReLU],
    rough_sae: Callable[[int], ReLU],
) -> None:
    mean = torch.from_numpy(harvested["store"].stats("train", "resid_post.0").mean).float()
    for name, sae in (("mean", constant_sae(mean)), ("rough", rough_sae(16)), ("same", identity_sae(16))):
        saved(name, sae)
    saved("other", rough_sae(16), site="mlp_out.1")
    found = results(config)
    by_site = {site["site"]: site for site in found["sites"]}
    assert set(by_site) == {"resid_post.0", "mlp_out.1"}
    site = by_site["resid_post.0"]
    metrics = {Path(row["folder"]).name: row["metrics"] for row in site["saes"]}
    assert [row["number"] for row in site["saes"]] == [1, 2, 3]
    l0 = [row["metrics"]["l0"]["value"] for row in site["saes"]]
    assert l0 == sorted(l0)
    assert metrics["same"]["recovered_zero"]["value"] == 1 and metrics["mean"]["recovered_mean"]["value"] == 0
    assert metrics["mean"]["nmse"]["value"] >= 1
    assert len({row["ce_clean"]["value"] for row in metrics.values()}) == 1
    assert 250 <= site["tokens"] < 250 + 16 and site["context"] == 16
    assert site["excluded"] == site["sequences"]  # one BOS a context
    assert site["predicted"] == site["tokens"]
    assert site["storage"]["dtype"] == "bfloat16" and 0 < site["storage"]["nmse"] < 1e-4


def test_progress_is_a_few_lines_where_nobody_watches(
    saved: Callable[..., Path],
    config: dict[str, Any],
    rough_sae: Callable[[int], ReLU],
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved("rough", rough_sae(16))
    evaluate(config | {"lm_batch": 1})  # 17 batches, each of which is counted
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("evaluate 1 SAE at resid_post.0  ")]
    assert len(lines) == 10 and "\r" not in said
    assert lines[-1].startswith("evaluate 1 SAE at resid_post.0  100%")


def test_the_tokens_scored_are_the_stores_held_out_rows(
    saved: Callable[..., Path], config: dict[str, Any], harvested: dict[str, Any], rough_sae: Callable[[int], ReLU]
) -> None:
    """The rows harvested of held-out documents, taken from the store, give the same NMSE up to their rounding."""
    sae = rough_sae(16)
    saved("rough", sae)
    store = harvested["store"]
    rows = store.rows("heldout", "resid_post.0")
    reader = open_reader(store, "heldout", "resid_post.0")
    parts = []
    for chunk, size in enumerate(reader.sizes):
        out = np.empty((store.layout.chunk_rows, 16), dtype=np.uint16)
        reader.read(chunk, out)
        parts.append(torch.from_numpy(out[:size].view(np.int16)).view(torch.bfloat16))
    x = torch.cat(parts).float()
    x_hat = sae(x).detach()
    expected = float((x - x_hat).double().square().sum() / (x.double() - x.double().mean(0)).square().sum())
    found = results(config | {"tokens": rows})["sites"][0]
    assert found["tokens"] == rows
    assert found["saes"][0]["metrics"]["nmse"]["value"] == pytest.approx(expected, rel=2e-3)


def test_one_sae_by_itself_and_another_batch_size(
    saved: Callable[..., Path], config: dict[str, Any], rough_sae: Callable[[int], ReLU]
) -> None:
    folder = saved("rough", rough_sae(16))
    saved("other", rough_sae(16))
    one = results(config | {"saes": str(folder), "lm_batch": 3})
    both = results(config | {"saes": [str(folder), str(folder.parent / "oth*")]})
    (row,) = one["sites"][0]["saes"]
    assert len(both["sites"][0]["saes"]) == 2
    for name, entry in row["metrics"].items():
        assert both["sites"][0]["saes"][0]["metrics"][name]["value"] == pytest.approx(entry["value"], rel=1e-5), name
    assert row["l0"] == both["sites"][0]["saes"][0]["l0"]


def test_differences_from_a_baseline(
    saved: Callable[..., Path],
    config: dict[str, Any],
    identity_sae: Callable[[int], ReLU],
    rough_sae: Callable[[int], ReLU],
) -> None:
    base = saved("rough", rough_sae(16))
    saved("same", identity_sae(16))
    saved("other", rough_sae(16), site="mlp_out.1")
    first, second = results(config | {"baseline": str(base), "saes": str(base.parent / "**")})["sites"]
    site, other = (first, second) if first["site"] == "resid_post.0" else (second, first)
    assert other["baseline"] is None and "delta" not in other["saes"][0]
    rows = {Path(row["folder"]).name: row for row in site["saes"]}
    assert set(rows["rough"]["delta"]["nmse"].values()) == {0.0}
    delta = rows["same"]["delta"]["nmse"]
    assert (
        delta["value"] == -rows["rough"]["metrics"]["nmse"]["value"] and delta["low"] < delta["value"] < delta["high"]
    )
    assert rows["same"]["delta"]["ce_clean"]["se"] == 0  # what both share does not vary
    text = (Path(config["out"]) / "report.md").read_text()
    assert "Differences from **" in text
    with pytest.raises(UserError, match="names 2 SAEs of one site"):
        copy = saved("deeper/rough", rough_sae(16))
        results(config | {"baseline": copy.name})


GAO = {
    "tasks": None,
    "probe_tokens": 100,
    "units": 6,
    "examples": 2,
    "places": 2,
    "ablations": 2,
    "baselines": ["channels", "neurons", "random", "pca"],
}


def test_feature_metrics_of_an_sae_and_the_baselines(
    saved: Callable[..., Path],
    config: dict[str, Any],
    rough_sae: Callable[[int], ReLU],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved("rough", rough_sae(16))
    (tmp_path / "tasks.yaml").write_text("- {name: low, token: 'w[0-4]'}\n- {name: none, token: 'q'}\n")
    own = {"gao": ["probe", "patterns"], "gao_with": GAO | {"tasks": str(tmp_path / "tasks.yaml")}}
    (site,) = results(config | own)["sites"]
    names = [row["name"] for row in site["gao"]["bases"]]
    assert names == ["1 relu", "residual channels", "MLP neurons", "random directions", "PCA"]
    assert [row["width"] for row in site["gao"]["bases"]] == [48, 16, 64, 48, 16]
    for row in site["gao"]["bases"]:
        assert set(row["probe"]["tasks"]) == {"low"} and row["patterns"]["units"] == 6 and "ablation" not in row
        assert 0 < row["probe"]["tasks"]["low"]["loss_chosen"] <= row["probe"]["loss_base_rate"] * 1.1
    assert site["gao"]["left_out"] == ["none"]
    printed = capsys.readouterr().out
    for metric in ("sample", "probe", "patterns"):
        start = f"feature metrics, {metric}: "
        assert any(line.startswith(start) and line.endswith(" min") for line in printed.splitlines()), metric
    text = (Path(config["out"]) / "report.md").read_text()
    assert "### Feature metrics" in text and "Tasks with too few tokens of one answer, left out: none." in text


def test_a_folder_with_brackets_is_found(saved: Callable[..., Path], rough_sae: Callable[[int], ReLU]) -> None:
    folder = saved("sae.k=[4]", rough_sae(16))
    assert [sae.folder for sae in find_saes(str(folder))] == [folder]
    assert [sae.folder for sae in find_saes([str(folder.parent), str(folder)])] == [folder]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"saes": "nowhere"}, "saes=nowhere holds no trained SAE"),
        ({"saes": []}, "saes is empty"),
        ({"tokens": 0}, "tokens=0 is not allowed: it should be greater than or equal to 1"),
        ({"tokens": 100_000}, r"tokens=100,000 .* holds"),
        ({"bootstrap": 1}, "bootstrap=1 is not allowed"),
        ({"lm_batch": 0}, "lm_batch=0"),
        ({"cache": "elsewhere"}, "no store in elsewhere has the fingerprint"),
        ({"gao": "probes"}, "feature_metrics.0=probes is not allowed"),
        ({"gao": "all", "form": "batch"}, "feature_metrics are measured in the inference form"),
        ({"gao": "all", "gao_with": {"baselines": ["ica"]}}, "feature_metrics_with.baselines.0=ica is not allowed"),
        ({"form": "training"}, "form=training is not allowed"),
        ({"baseline": "gone"}, "baseline=gone is none of the SAEs"),
        ({"device": "cuda:77"}, "device=cuda:77"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    saved: Callable[..., Path],
    config: dict[str, Any],
    rough_sae: Callable[[int], ReLU],
    change: dict[str, Any],
    sentence: str,
) -> None:
    saved("rough", rough_sae(16))
    with pytest.raises(UserError, match=sentence):
        evaluate(config | change)
    assert not Path(config["out"]).exists()


def test_records_that_lead_nowhere(
    saved: Callable[..., Path], config: dict[str, Any], rough_sae: Callable[[int], ReLU]
) -> None:
    saved("rough", rough_sae(16), site="resid_post.1")
    with pytest.raises(UserError, match=r"resid_post.1"):
        evaluate(config)
    saved("rough", rough_sae(16), fingerprint=None)
    with pytest.raises(UserError, match="does not say which store"):
        evaluate(config)


def test_a_missing_or_other_model_is_refused(
    saved: Callable[..., Path], config: dict[str, Any], harvested: dict[str, Any], rough_sae: Callable[[int], ReLU]
) -> None:
    saved("rough", rough_sae(16))
    lm = harvested["root"] / "lm"
    away = lm.rename(lm.with_name("away"))
    try:
        with pytest.raises(UserError, match="model folder"):
            evaluate(config)
    finally:
        away.rename(lm)
    weights = lm / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"\0\0\0\0")
    try:
        with pytest.raises(UserError, match=r"made from something else .*model.safetensors"):
            evaluate(config)
    finally:
        weights.write_bytes(whole)


def test_changed_text_is_refused(
    saved: Callable[..., Path], config: dict[str, Any], harvested: dict[str, Any], rough_sae: Callable[[int], ReLU]
) -> None:
    saved("rough", rough_sae(16))
    extra = harvested["root"] / "text" / "extra.txt"
    extra.write_text("w1 w2 w3")
    try:
        with pytest.raises(UserError, match=r"made from something else \(text.documents: 60 in the store, 61 now"):
            evaluate(config)
    finally:
        extra.unlink()


@pytest.mark.slow
def test_the_command_ends_with_the_report(
    saved: Callable[..., Path], config: dict[str, Any], rough_sae: Callable[[int], ReLU]
) -> None:
    saved("rough", rough_sae(16))
    names = ("saes", "cache", "tokens", "bootstrap", "device", "out")
    overrides = [f"{name}={config[name]}" for name in names]
    command = [sys.executable, "-m", "evaluate", *overrides, f"hydra.run.dir={config['out']}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: {config['out']}/report.md"


@pytest.mark.slow
def test_the_command_ends_with_a_sentence() -> None:
    command = [sys.executable, "-m", "evaluate", "saes=nowhere"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: saes=nowhere holds no trained SAE")
    assert "Traceback" not in failed.stderr


def test_what_was_new_on_the_hub_then_is_asked_for_by_its_commit() -> None:
    layout = {"dtype": "float32", "context": 4, "chunk_rows": 4, "chunks_per_unit": 1, "mixing_seed": 0}
    text = {"kind": "dataset", "name": "stories", "revision": None}
    identity = {"layout": layout, "model": {"commit": "m" * 40}, "text": {**text, "revision": "t" * 40}}
    settings = {"model": {"name": "gpt2", "revision": None}, "text": text, "packing": {}}
    found = pinned(Store(Path("nowhere"), Manifest(identity, settings, "gpt2", 4)))
    assert (found["model"]["revision"], found["text"]["revision"]) == ("m" * 40, "t" * 40)
    local = Manifest({**identity, "model": {"commit": None}, "text": {"kind": "stdlib"}}, settings, "gpt2", 4)
    assert pinned(Store(Path("nowhere"), local)) == settings
