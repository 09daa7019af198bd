"""The step's benchmark: that contestants do the work asked for, and what it makes of their times."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contestants.process import DENSE, FLOOR, OURS, ROOT
from benchmarks.contestants.spec import PREFIXES, Spec, level
from benchmarks.contestants.table import Cell, fastest_peer, goals, ratio, show, valid
from benchmarks.step import failing, mixture, parsed
from train.sae.variants.matryoshka import Matryoshka

PEERS_PYTHON = ROOT / ".venv-peers/bin/python"


def spec(**changes: Any) -> Spec:
    return Spec(**{"variant": "batchtopk", "d_model": 16, "width": 40, "k": 4, "batch": 4096, **changes})


def row(*ms: float, peak_mb: float = 100.0) -> dict[str, Any]:
    facts = {"l0": 4.0, "dead": 0.0, "auxk": 0.0}
    return {"ms": list(ms), "steps": 1, "peak_mb": peak_mb, "device_mb": 0.0, "facts": facts}


def cell(**rows: dict[str, Any]) -> Cell:
    named = {name.replace("_", "-"): value for name, value in rows.items()}
    named.get(FLOOR, {}).setdefault("facts", {}).update(tflops=1.0, gb_s=1.0, roofline_ms=1.0)
    return {"spec": vars(spec()), "threads": 2, "machine": "CPU", "torch": "2", "allocator": "own", "rows": named}


def test_the_level_leaves_the_activity_asked_for() -> None:
    z_BF = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    assert float((z_BF > level(z_BF, 30.0)).sum() / 64) == 30.0


@pytest.mark.parametrize(("dead", "count"), [(0.0, 0), (0.25, 10), (0.2, 8), (1.0, 40)])
def test_the_share_of_dead_latents(dead: float, count: int) -> None:
    index = spec(dead=dead).dead_latents()
    assert len(index) == count == len(set(index.tolist()))


def test_matryoshkas_prefixes_are_our_own() -> None:
    sae = Matryoshka(8, 64, k=4)
    assert sae.config.prefixes == PREFIXES
    assert spec(width=64).prefixes == sae.config.sizes


def test_the_batches_have_the_scale_that_dataset_normalisation_gives() -> None:
    assert float(mixture(512, 64).square().sum(-1).mean()) == pytest.approx(64, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "facts", "why"),
    [
        ({}, {"l0": 4.0, "dead": 0, "auxk": 0.0}, None),
        ({}, {"l0": 40.0, "dead": 0, "auxk": 0.0}, "L0"),
        ({"dead": 0.2}, {"l0": 4.0, "dead": 8, "auxk": 0.1}, None),
        ({"dead": 0.2}, {"l0": 4.0, "dead": 0, "auxk": 0.1}, "count as dead"),
        ({"dead": 0.2}, {"l0": 4.0, "dead": 8, "auxk": 0.0}, "AuxK"),
        ({"variant": "gated", "l0": 10.0, "dead": 0.2}, {"l0": 9.0, "dead": 8, "auxk": 0.0}, None),
    ],
)
def test_a_contestant_that_shirks_is_found(changes: dict[str, Any], facts: dict[str, float], why: str | None) -> None:
    found = failing(spec(**changes), "sae-lens", facts)
    assert (found is None) if why is None else (found is not None and why in found)


def test_ratios_are_of_the_same_round() -> None:
    assert ratio(row(2.0, 40.0, 9.0), row(1.0, 10.0)) == 3.0  # median of 2 and 4; the slow one has no third round


def test_the_goals_are_judged_against_the_fastest_that_finished() -> None:
    failed = {"failed": "RuntimeError"}
    found = cell(
        ours=row(100.0, 100.0, peak_mb=80.0),
        sparse_floor=row(70.0, 70.0),
        sae_lens=row(900.0, 900.0, peak_mb=300.0),
        dictionary_learning_repaired=row(650.0, 650.0, peak_mb=100.0),
        dictionary_learning=failed,
    )
    assert fastest_peer(found) == "dictionary-learning-repaired"
    faster, floor, memory = goals([found])
    assert "MISSED" in faster and "6.50 (goal: at least 7)" in faster
    assert "MISSED" in floor and "1.43 (goal: at most 1.25)" in floor
    assert "MISSED" in memory and "0.80 (goal: at most 0.75)" in memory
    lines = {line.split()[0]: line.split() for line in show(found).splitlines()}
    assert lines["ours"][1] == "100.0" and "6.50" in lines["ours"] and "1.43" in lines["ours"]
    assert "RuntimeError" in lines["dictionary-learning"]


def run(tmp_path: Path, *options: str) -> dict[str, Cell]:
    """Cells by variant, of a tiny size with a fifth of the latents dead."""
    out = tmp_path / "step.json"
    sizes = ["--d-model", "32", "--width", "256", "--k", "4", "--l0", "12", "--batches", "64", "--dead", "0.2"]
    pace = ["--rounds", "2", "--steps", "3", "--threads", "1", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.step", *sizes, *pace, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {one["spec"]["variant"]: one for one in json.loads(out.read_text())}


@pytest.mark.slow
def test_ours_and_the_floors_run(tmp_path: Path) -> None:
    cells = run(tmp_path, "--variants", "batchtopk", "gated", "--only", OURS, FLOOR, DENSE)
    assert set(cells) == {"batchtopk", "gated"}
    for one in cells.values():
        assert all(len(one["rows"][name]["ms"]) == 2 for name in (OURS, FLOOR, DENSE))
    assert cells["batchtopk"]["rows"][OURS]["facts"]["dead"] == 51


@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="no .venv-peers: `make peers` makes it")
def test_the_peers_run(tmp_path: Path) -> None:
    """A step of each library that trains TopK: they did the work asked for, or would have failed."""
    peers = ["sae-lens", "dictionary-learning-repaired", "sparsify"]
    found = run(tmp_path, "--variants", "topk", "--only", OURS, *peers)["topk"]
    assert set(valid(found)) == {OURS, *peers}


def test_missing_peers_are_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "python")
    monkeypatch.setattr(sys, "argv", ["step", "--peers-python", missing])
    with pytest.raises(SystemExit):
        parsed()
    monkeypatch.setattr(sys, "argv", ["step", "--peers-python", missing, "--only", OURS])
    assert parsed().only == [OURS]
