"""From text to a replacement model: harvest the embedded LM's MLPs, train transcoders and an SAE, evaluate, export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from evaluate.run import evaluate
from harvest.run import harvest
from tests.helpers.composing import composed
from tests.helpers.settings import stage_config
from train.interop.circuit_tracer import read
from train.interop.export import export_set
from train.run import TrainRequest, train_all
from train.sae import load

SITES = "sites=[mlp_in.0,mlp_out.0,mlp_in.1,mlp_out.1]"
TEXT = ("model=embedded", "text=files", "text.paths=[texts_here]", "packing.heldout=0.3", "cache=cache_here")
SMALL = ("batch=64", "tokens=1920", "calibration_tokens=512", "heldout_tokens=512", "trainer=cpu", "out=out_here")


@pytest.mark.slow
def test_harvest_train_evaluate_and_export(tmp_path: Path) -> None:
    words = Path(__file__).read_text().split()
    (tmp_path / "texts").mkdir()
    for number in range(30):
        turned = words[number:] + words[:number]
        (tmp_path / "texts" / f"{number}.txt").write_text(" ".join(turned))
    places = {"texts_here": tmp_path / "texts" / "*.txt", "cache_here": tmp_path / "cache"}
    harvest(composed("harvest", (*TEXT, SITES, "tokens=3000", "heldout_tokens=1000", "lm_batch=4"), places))

    jobs = []
    for name, own in {
        "jump-0": ("site=mlp_in.0", "target=mlp_out", "sae=batchtopk"),
        "jump-1": ("site=mlp_in.1", "target=mlp_out", "sae=batchtopk", "sae.skip=true"),
        "sae-1": ("site=mlp_out.1", "sae=topk"),
    }.items():
        given = (*TEXT, *SMALL, *own, "sae.k=4", "sae.width=64")
        jobs.append(TrainRequest(composed("train", given, places | {"out_here": tmp_path / "saes" / name}), given))
    train_all(jobs)
    transcoder = load(tmp_path / "saes" / "jump-1")
    assert (transcoder.site, transcoder.target, transcoder.config.skip) == ("mlp_in.1", "mlp_out.1", True)

    shared = {"cache": str(tmp_path / "cache"), "tokens": 400, "bootstrap": 20, "device": "cpu"}
    report = evaluate(
        stage_config("evaluate", saes=str(tmp_path / "saes"), out=str(tmp_path / "all"), **shared)
    ).content
    kinds = {site["site"]: Counter(row["variant"] for row in site["saes"]) for site in report["sites"]}
    assert kinds == {
        "mlp_out.0": {"batchtopk transcoder": 1},
        "mlp_out.1": {"batchtopk skip transcoder": 1, "topk": 1},
    }
    for site in report["sites"]:
        assert all(0 < row["metrics"]["nmse"]["value"] < 1.5 for row in site["saes"])
    layers = [tmp_path / "saes" / f"jump-{layer}" for layer in (0, 1)]
    names = [str(folder) for folder in layers]
    made = evaluate(stage_config("evaluate", saes=names, out=str(tmp_path / "set"), together=True, **shared))
    (together,) = made.content["together"]
    metrics = together["metrics"]
    assert metrics["ce_clean"]["value"] < metrics["ce_spliced"]["value"]
    alone = [row["metrics"]["l0"]["value"] for site in report["sites"] for row in site["saes"][:1]]
    assert metrics["l0"]["value"] == pytest.approx(sum(alone), rel=0.5)

    export_set(layers, tmp_path / "exported")
    assert [foreign.target for foreign in read(tmp_path / "exported").values()] == ["mlp_out.0", "mlp_out.1"]
