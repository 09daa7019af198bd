"""`make claims` in its smallest form, and the sentences for what a user can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims.bench import BASELINE
from benchmarks.claims.run import candidates, judge
from data.base.errors import UserError
from evaluate.inputs import SavedSAE
from train.sae.io import save
from train.sae.variants.topk import TopK

ROOT = Path(__file__).resolve().parents[3]


def config(harvested: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    named = {"saes": str(tmp_path / "saes"), "cache": harvested["config"]["cache"], "out": str(tmp_path / "out")}
    sizes = {"expansion": 2, "batch": 16, "tokens": 250, "calibration_tokens": 64, "lm_batch": None}
    return named | sizes | {"bootstrap": 50, "seed": 0, "device": "cpu", "device_map": None}


def saved(harvested: dict[str, Any], folder: Path, width: int, k: int, **record: Any) -> None:
    sae = TopK(16, width, k=k)
    manifest = harvested["store"].manifest
    known = {"site": "resid_post.0", "fingerprint": manifest.fingerprint, "store": manifest.folder}
    training = {"tokens": 1000, "seed": 0, "batch": 16, "dead": 2, "dead_after": 100}
    save(sae, folder, known | {"model": manifest.settings["model"], "training": training} | record)


def test_scores_are_kept_and_made_once(
    harvested: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in (1, 2):
        saved(harvested, tmp_path / "saes" / str(k), 32, k)
    saved(harvested, tmp_path / "saes" / "again", 32, 2)
    settings = config(harvested, tmp_path)
    path = judge(settings)
    told = json.loads((path.parent / "claims.json").read_text())
    assert {(sae["settings"]["k"], sae["form"]) for sae in told["saes"]} == {
        (k, form) for k in (1, 2) for form in ("inference", "threshold")
    }
    assert len(told["saes"]) == 4
    by_form = {(sae["settings"]["k"], sae["form"]): sae["metrics"]["l0"]["value"] for sae in told["saes"]}
    assert by_form[2, "inference"] == 2
    assert 1 < told["place"]["documents"] < told["place"]["contexts"]
    assert f"of {told['place']['documents']} documents" in path.read_text()
    monkeypatch.setattr("benchmarks.claims.scores.open_text", None)  # nothing is left to be scored
    assert judge(settings) == path
    assert json.loads((path.parent / "claims.json").read_text()) == told


def test_mistakes_are_told_in_a_sentence(harvested: dict[str, Any], tmp_path: Path) -> None:
    settings = config(harvested, tmp_path)
    with pytest.raises(UserError, match="holds no trained SAE"):
        judge(settings)
    saved(harvested, tmp_path / "saes" / "one", 32, 2)
    for change, told in (
        ({"tokens": 0}, "tokens=0"),
        ({"batch": 1.5}, r"batch=1\.5"),
        ({"expansion": -1}, "expansion"),
    ):
        with pytest.raises(UserError, match=told):
            judge(settings | change)
    saved(harvested, tmp_path / "saes" / "two", 32, 2, site="mlp_out.1")
    with pytest.raises(UserError, match="several sites or stores whose rows are without special tokens"):
        judge(settings)


def test_forms_are_asked_of_the_plain_saes_of_the_fixed_width() -> None:
    def trained(variant: str, width: int, batch: int = 16, **more: Any) -> SavedSAE:
        settings = {"d_in": 16, "width": width, "k": 2, **more}
        training = {"tokens": 1000, "seed": 0, "batch": batch}
        return SavedSAE(Path(variant), {"variant": variant, "settings": settings, "training": training})

    saes = [
        trained("topk", 32),
        trained("topk", 64),
        trained("topk", 32, batch=8),
        trained("topk", 32, tied_init=False),
        trained("batchtopk", 32),
        trained("relu", 32, **BASELINE),
        trained("relu", 32),
        trained("topk", 32),
    ]
    forms = [(one.form, one.trained.config["variant"], one.trained is not saes[0]) for one in candidates(saes, 2, 16)]
    more = [one for one in forms if one[0] != "inference"]
    assert [form[:2] for form in more] == [
        ("threshold", "topk"),
        ("batch", "batchtopk"),
        ("per token", "batchtopk"),
        ("rescaled", "relu"),
    ]
    assert len(forms) - len(more) == 7  # the last is the first again


@pytest.mark.slow
def test_the_smallest_form_of_make_claims(harvested: dict[str, Any], tmp_path: Path) -> None:
    """The target's command on a tiny model: every claim meets the SAEs it is about; a second run trains none."""
    text = f"text.paths=[{harvested['root'] / 'text' / '*.txt'}]"
    model = [f"model.name={harvested['root'] / 'lm'}", "model.device=cpu", "text=files", text]
    model += ["packing.context=16", "packing.heldout=0.3"]
    sizes = {"rows": 2000, "tokens": 1000, "special_rows": 1500, "special_tokens": 500, "calibration_tokens": 256}
    sizes |= {"batch": 32, "batches": "[16,64]", "widths": "[2,4,8]", "width": 4, "widest": 8}
    sizes |= {
        "k": 2,
        "ks": "[1,2,4]",
        "rival_ks": "[2,4,6]",
        "site": "resid_post.0",
        "harvest": '["heldout_tokens=300"]',
    }
    sizes |= {"train": '["heldout_tokens=300"]', "rates.batchtopk": 5e-3}
    overrides = [f"study.{name}={value}" for name, value in sizes.items()]
    overrides.append(f"study.model={json.dumps(model)}")
    overrides += [
        f"cache={tmp_path / 'cache'}",
        f"out={tmp_path / 'claims'}",
        "tokens=250",
        "bootstrap=100",
        "device=cpu",
    ]
    command = [sys.executable, "-m", "benchmarks.claims", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "claims" / "claims.json").read_text())
    compared = {one["claim"] for one in record["findings"] if one["comparisons"]}
    assert {"S1", "S2", "S3", "S4", "S5", "S7", "S8", "future work"} <= compared
    forms = {(sae["variant"], sae["form"]) for sae in record["saes"]}
    assert {("batchtopk", "batch"), ("batchtopk", "per token"), ("topk", "threshold"), ("relu", "rescaled")} <= forms
    assert {sae["training"]["batch"] for sae in record["saes"]} == {16, 32, 64}
    # grid 18, dead 3 and one of the grid's, rivals 6, baseline 3, batch 4, special 6; other forms 3 + 6 + 3
    assert len(record["saes"]) == 52
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("sae.safetensors")}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("sae.safetensors")} == weights
