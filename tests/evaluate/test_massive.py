"""A model with a planted sink: one position of every context has a hundred times the norm of the others."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from data.base.sites import Site
from evaluate.features.make import make
from evaluate.inputs import HeldoutText, SavedSAE, open_text
from evaluate.massive import MassiveRule, disagreement, rule_of, site_median_norm, strictest
from evaluate.run import evaluate
from harvest.hooks import replace, run_to
from tests.helpers.settings import stage_config
from tests.helpers.tiny_lm import harvest_of
from train.sae.base import SAE
from train.sae.io import save
from train.sae.variants.relu import ReLU

SINK = 3  # the position in a context of 16, of which position 0 is a BOS
SITE = "resid_post.0"


@pytest.fixture(scope="module")
def sunk(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Any) -> dict[str, Any]:
    """The store of a model whose position SINK is massive, and its held-out text."""
    model = copy.deepcopy(tiny_lm)
    with torch.no_grad():
        norms = run_to(model, [Site.parse(SITE)], torch.arange(1, 17)[None])[SITE].norm(dim=-1)
        model.transformer.wpe.weight[SINK, 5] = 100 * float(norms.median())
    found = harvest_of(model, tmp_path_factory.mktemp("sunk"))
    config = {"tokens": 250, "device": "cpu", "device_map": None}
    return {**found, "heldout": open_text(found["store"], config)}


@pytest.fixture
def saved(sunk: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    def write(name: str, sae: SAE, outliers: dict[str, Any] | None = None) -> str:
        record = {"site": SITE, "fingerprint": sunk["store"].manifest.fingerprint, "store": "s"}
        save(sae, tmp_path / "saes" / name, {**record, "training": {"outliers": outliers}})
        return str(tmp_path / "saes" / name)

    return write


@pytest.fixture
def scored(sunk: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Evaluates the saved SAEs: the site's part of report.json, and report.md."""

    def run(**settings: Any) -> tuple[dict[str, Any], str]:
        own = {"saes": str(tmp_path / "saes"), "cache": sunk["config"]["cache"], "out": str(tmp_path / "out")}
        path = evaluate(stage_config("evaluate", **own, tokens=250, bootstrap=20, device="cpu", **settings)).path
        (site,) = json.loads((path.parent / "report.json").read_text())["sites"]
        return site, path.read_text()

    return run


def rows_of(text: HeldoutText) -> Tensor:
    """Every row of the site, [S, T, D] float64."""
    ids = torch.from_numpy(text.packed.contexts).long()
    return run_to(text.model, [Site.parse(SITE)], ids)[SITE].double()


def nmse_of(sae: SAE, x_ND: Tensor) -> float:
    error = (x_ND - sae(x_ND.float()).detach().double()).square().sum()
    return float(error / (x_ND - x_ND.mean(0)).square().sum())


def test_the_sink_is_planted(sunk: dict[str, Any]) -> None:
    norms = rows_of(sunk["heldout"]).norm(dim=-1)
    median = site_median_norm(sunk["heldout"], Site.parse(SITE))
    massive = (norms > 10 * median).nonzero()[:, 1]
    assert massive.tolist() == [SINK] * len(norms) and float(norms[:, SINK].min()) > 50 * median


def test_ordinary_rows_come_first_and_all_rows_beside_them(
    sunk: dict[str, Any],
    saved: Callable[..., str],
    scored: Callable[..., tuple[dict[str, Any], str]],
    rough_sae: Callable[[int], ReLU],
) -> None:
    """Issue 1b: no SAE has a rule, so massive rows are fed and spliced, and told apart in the report."""
    sae = rough_sae(16)
    saved("rough", sae)
    site, text = scored()
    packed, x_STD = sunk["heldout"].packed, rows_of(sunk["heldout"])
    keep = torch.from_numpy(packed.keep)
    ordinary = keep.clone()
    ordinary[:, SINK] = False
    (row,) = site["saes"]
    assert row["metrics"]["nmse"]["value"] == pytest.approx(nmse_of(sae, x_STD[ordinary]), rel=1e-4)
    assert row["all_rows"]["nmse"]["value"] == pytest.approx(nmse_of(sae, x_STD[keep]), rel=1e-4)
    assert row["metrics"]["nmse"]["value"] != pytest.approx(row["all_rows"]["nmse"]["value"], rel=0.2)
    l0 = (sae.encode(x_STD.float().flatten(0, 1)) > 0).sum(-1).double().view(keep.shape)
    assert row["metrics"]["l0"]["value"] == pytest.approx(float(l0[ordinary].mean()), rel=1e-3)
    assert row["all_rows"]["l0"]["value"] == pytest.approx(float(l0[keep].mean()), rel=1e-3)
    assert sum(row["l0"]["histogram"]) == int(ordinary.sum()) and site["tokens"] == int(keep.sum())
    assert site["massive"]["rows"] == len(keep) and site["massive"]["left_out"] == 0
    assert text.index("| 1 relu") < text.index("Over all rows, the massive ones among them:")
    assert f"{len(keep):,} of the rows are massive" in text


def test_rows_an_sae_was_trained_without_are_like_special_tokens(
    sunk: dict[str, Any],
    saved: Callable[..., str],
    scored: Callable[..., tuple[dict[str, Any], str]],
    rough_sae: Callable[[int], ReLU],
    constant_sae: Callable[[Tensor], ReLU],
) -> None:
    """Issue 1c: by the rule of one SAE's config.json the rows are neither fed nor spliced nor scored, for both SAEs."""
    text = sunk["heldout"]
    median = site_median_norm(text, Site.parse(SITE))
    sae, constant = rough_sae(16), constant_sae(torch.ones(16))
    saved("rough", sae, {"times": 10.0, "median": median, "left_out": {}})
    saved("constant", constant)
    site, written = scored()
    keep = torch.from_numpy(text.packed.keep).clone()
    before = int(keep.sum())
    keep[:, SINK] = False
    rows = {Path(row["folder"]).name: row for row in site["saes"]}
    assert site["tokens"] == int(keep.sum()) == before - len(keep) and site["excluded"] == len(keep)
    assert site["massive"]["left_out"] == len(keep) and site["massive"]["rows"] == 0
    assert rows["rough"]["metrics"]["nmse"]["value"] == pytest.approx(nmse_of(sae, rows_of(text)[keep]), rel=1e-4)
    assert "all_rows" not in rows["rough"]
    assert "neither fed, nor replaced, nor scored" in written
    assert "trained without different rows" in written  # the two rules differ, which is said

    ids = torch.from_numpy(text.packed.contexts).long()
    put: Callable[[Tensor], Tensor] = lambda x: torch.where(keep[:, :, None], torch.ones(()), x)  # noqa: E731
    with torch.no_grad(), replace(text.model, Site.parse(SITE), put):
        logp = text.model(input_ids=ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    ce = -logp.gather(2, ids[:, 1:, None])[..., 0][keep[:, 1:]].mean()
    assert rows["constant"]["metrics"]["ce_spliced"]["value"] == pytest.approx(float(ce), rel=1e-5)


def test_feature_pages_follow_the_rule(
    sunk: dict[str, Any], saved: Callable[..., str], rough_sae: Callable[[int], ReLU], tmp_path: Path
) -> None:
    text = sunk["heldout"]
    median = site_median_norm(text, Site.parse(SITE))
    folder = saved("rough", rough_sae(16), {"times": 10.0, "median": median})
    own = {"folder": folder, "cache": sunk["config"]["cache"], "out": str(tmp_path / "pages")}
    page = make(stage_config("features", **own, tokens=250, device="cpu"))
    index = json.loads((page.parent / "index.js").read_text()[len("thresher.index(") : -len(");\n")])
    keep = text.packed.keep.copy()
    keep[:, SINK] = False
    fired = (rough_sae(16).encode(rows_of(text).float()[torch.from_numpy(keep)]) > 0).sum(0)
    np.testing.assert_array_equal(index["fired"], fired.numpy())
    assert f"{len(keep)} massive rows left out" in page.read_text()


def an_sae(outliers: Any) -> SavedSAE:
    return SavedSAE(Path("it"), {"training": {"outliers": outliers}})


def test_the_strictest_rule_holds_and_damaged_ones_are_refused() -> None:
    assert rule_of(SavedSAE(Path("it"), {})) is None and rule_of(an_sae(None)) is None
    rules = [rule_of(an_sae({"times": times, "median": median})) for times, median in ((10, 3.0), (5, 4.0))]
    assert strictest([None, *rules]) == MassiveRule(5.0, 4.0) and strictest([None]) is None
    assert disagreement([rules[0], rules[0]]) is None and disagreement([None, None]) is None
    assert "no row; rows with a norm above 5 times" in (disagreement([None, rules[1]]) or "")
    for damaged in ({"times": 10}, {"times": "x", "median": 1}, 7, {"times": float("nan"), "median": 1}):
        with pytest.raises(UserError, match="record of outliers that can"):
            rule_of(an_sae(damaged))
