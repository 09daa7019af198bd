"""A study becomes the commands a user would give."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.claims.sweeps import Study, commands
from data.base.errors import UserError

SMALL: dict[str, Any] = {
    "model": ["model.name=lm", "text=files"],
    "site": "resid_post.0",
    "rows": 2000,
    "tokens": 1000,
    "special_rows": 500,
    "special_tokens": 300,
    "k": 2,
    "ks": [1, 2, 4],
    "rival_ks": [2, 4, 6],
}


def of(lines: list[list[str]], word: str) -> list[list[str]]:
    return [line for line in lines if word in line]


def test_two_harvests_come_before_six_sweeps() -> None:
    lines = commands(Study.of(SMALL), "cache", "out")
    assert [line[1] for line in lines] == ["harvest"] * 2 + ["train"] * 6
    assert all({"model.name=lm", "text=files", "cache=cache"} <= set(line) for line in lines)
    assert "tokens=2000" in lines[0] and "packing.keep_special=true" not in lines[0]
    assert {"tokens=500", "packing.keep_special=true"} <= set(lines[1])
    (grid,) = of(lines, "+claims=grid")
    assert {"sae.expansion=4,8,16,32", "sae.k=1,2,4", "batch=1024", "seed=0", "tokens=1000"} <= set(grid)
    assert "hydra.sweep.dir=out/saes/grid" in grid
    assert not any(word.startswith("optimizer.lr") for line in lines for word in line)
    (batch,) = of(lines, "+claims=batch")
    assert "batch=256,4096" in batch
    (special,) = of(lines, "+claims=special")
    assert {"tokens=300", "packing.keep_special=true"} <= set(special)


def test_settings_of_one_stage_reach_that_stage_alone() -> None:
    study = Study.of({**SMALL, "harvest": ["store.dtype=bfloat16"], "train": ["ema=0.999"]})
    for line in commands(study, "cache", "out"):
        assert ("store.dtype=bfloat16" in line) == (line[1] == "harvest")
        assert ("ema=0.999" in line) == (line[1] == "train")


def test_variants_of_one_rate_share_a_pass_and_others_do_not() -> None:
    rates = {"topk": 1e-3, "batchtopk": 2e-3, "gated": 4e-3, "jumprelu": 4e-3}
    lines = commands(Study.of({**SMALL, "rates": rates}), "cache", "out")
    grid = of(lines, "+claims=grid")
    assert [line[-2:] for line in grid] == [
        ["sae=topk", "optimizer.lr=0.001"],
        ["sae=batchtopk", "optimizer.lr=0.002"],
    ]
    (rivals,) = of(lines, "+claims=rivals")
    assert rivals[-1] == "optimizer.lr=0.004" and not any(word.startswith("sae=") for word in rivals)
    (dead,) = of(lines, "+claims=dead")
    assert dead[-1] == "optimizer.lr=0.001"
    (baseline,) = of(lines, "+claims=baseline")
    assert not any(word.startswith("optimizer.lr") for word in baseline)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"k": 0}, "k"), ({"rates": {"topk": -1}}, "topk"), ({"breadth": 4}, "breadth"), ({"ks": ["x"]}, "ks")],
)
def test_a_mistake_in_a_study_is_named(change: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        Study.of({**SMALL, **change})
