"""Crosscoders in the report: scored at each of their sites, by what plain hooks say; shares of their decoder norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from evaluate.features.make import make
from evaluate.inputs import HeldoutText, SavedSAE, open_text
from evaluate.massive import MassiveRule, rules_of
from evaluate.run import evaluate
from harvest.hooks import Site, replace, run_to
from tests.helpers.settings import stage_config
from tests.helpers.tiny_lm import WIDTH, harvest_of, tiny_gpt2
from train.sae.base import SAE
from train.sae.io import load_config, save
from train.sae.variants.relu import ReLU

SITES = ("resid_post.0", "resid_post.1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Any) -> dict[str, Any]:
    """A store of two sites, one of another model over the same text, and the held-out text."""
    root = tmp_path_factory.mktemp("crossed")
    (root / "base").mkdir()
    (root / "tuned").mkdir()
    found = harvest_of(tiny_lm, root / "base", sites=SITES)
    torch.manual_seed(3)
    tuned = tiny_gpt2().eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    other = harvest_of(tuned, root / "tuned", sites=SITES[:1])
    other["store"].path.rename(found["store"].path.parent / other["store"].path.name)
    text = open_text(found["store"], {"tokens": 250, "device": "cpu", "device_map": None})
    return {**found, "tuned": tuned, "other": other["store"], "heldout": text}


def rough(seed: int = 0) -> ReLU:
    """A crosscoder of two sites with an error; its latents write at both sites, or at one."""
    g = torch.Generator().manual_seed(seed)
    sae = ReLU(2 * WIDTH, 12, site_widths=(WIDTH, WIDTH), sparsity=0.0, input_norm="dataset")
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
        sae.norm.scale.copy_(torch.tensor([0.5, 2.0]))
        sae.W_dec[:4, WIDTH:] = 0
        sae.W_dec[4:6, :WIDTH] = 0
        sae.b_enc[11] = -1000  # never fires
    return sae


Save = Callable[..., Path]


@pytest.fixture
def saved(made: dict[str, Any], tmp_path: Path) -> Save:
    def write(name: str, sae: SAE, *places: tuple[Any, str]) -> Path:
        records = [
            {"site": site, "fingerprint": store.manifest.fingerprint, "store": store.manifest.folder}
            for store, site in places
        ]
        record: dict[str, Any] = records[0] if len(places) == 1 else {"sites": records}
        save(sae, tmp_path / "saes" / name, {**record, "fingerprint": records[0]["fingerprint"], "training": {}})
        return tmp_path / "saes" / name

    return write


@pytest.fixture
def report(made: dict[str, Any], tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    def run(**settings: Any) -> tuple[dict[str, Any], str]:
        own = {"saes": str(tmp_path / "saes"), "cache": made["config"]["cache"], "out": str(tmp_path / "out")}
        written = evaluate(stage_config("evaluate", **own, tokens=250, bootstrap=20, device="cpu", **settings))
        return written.content, written.path.read_text()

    return run


def rows_of(text: HeldoutText, model: Any, site: str) -> Tensor:
    ids = torch.from_numpy(text.packed.contexts).long()
    return run_to(model, [Site.parse(site)], ids)[site][torch.from_numpy(text.packed.keep)]


def cross_entropy(text: HeldoutText, model: Any, site: str, rows_ND: Tensor) -> float:
    """Of every kept token that is not the first of its context, in nats, with `rows_ND` at the kept tokens."""
    ids, keep = torch.from_numpy(text.packed.contexts).long(), torch.from_numpy(text.packed.keep)

    def put(x_BTD: Tensor) -> Tensor:
        changed = x_BTD.clone()
        changed[keep] = rows_ND
        return changed

    with torch.no_grad(), replace(model, Site.parse(site), put):
        logp = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    ce = -logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return float(ce[keep[:, 1:]].mean())


def value(row: dict[str, Any], name: str) -> float:
    return float(row["metrics"][name]["value"])


def test_each_site_is_spliced_in_turn_from_the_activations_of_all(
    saved: Save, report: Callable[..., tuple[dict[str, Any], str]], made: dict[str, Any], rough_sae: Any
) -> None:
    """Beside an SAE of the second site; NMSE, L0 and CE of each site are those of its part of x_hat."""
    sae, text = rough(), made["heldout"]
    saved("joined", sae, *((made["store"], site) for site in SITES))
    saved("plain", rough_sae(WIDTH), (made["store"], SITES[1]))
    found, markdown = report(baseline="plain")
    x = [rows_of(text, text.model, site) for site in SITES]
    f, x_hat = sae.encode_decode(torch.cat(x, 1))
    errors, deviations = [], []
    assert [site["site"] for site in found["sites"]] == [*SITES]
    for place, site in enumerate(found["sites"]):
        (row,) = [row for row in site["saes"] if row["folder"].endswith("joined")]
        part = x_hat[:, place * WIDTH : (place + 1) * WIDTH]
        errors.append(float((x[place] - part).double().square().sum()))
        deviations.append(float((x[place] - x[place].mean(0)).double().square().sum()))
        assert row["variant"] == "relu crosscoder" and row["input"] == " + ".join(SITES)
        assert row["expansion"] == 12 / WIDTH
        assert value(row, "nmse") == pytest.approx(errors[-1] / deviations[-1], rel=1e-4)
        assert value(row, "l0") == pytest.approx(float((f > 0).sum(1).double().mean()))
        assert value(row, "ce_spliced") == pytest.approx(cross_entropy(text, text.model, SITES[place], part), abs=1e-4)
    assert row["delta"]["nmse"]["value"] == pytest.approx(value(row, "nmse") - value(site["saes"][0], "nmse"), rel=1e-3)
    (entry,) = found["crosscoders"]
    # Over all sites each counts in its normalised units: s^2 is 0.25 and 4.
    over_all = (0.25 * errors[0] + 4 * errors[1]) / (0.25 * deviations[0] + 4 * deviations[1])
    assert entry["nmse"] == pytest.approx(over_all, rel=1e-4)
    assert "## Crosscoder joined: relu crosscoder of resid_post.0 + resid_post.1" in markdown
    assert "Crosscoders read resid_post.0 + resid_post.1, all untouched" in markdown


def test_latents_are_counted_by_where_they_write(
    saved: Save, report: Callable[..., tuple[dict[str, Any], str]], made: dict[str, Any], tmp_path: Path
) -> None:
    sae, text = rough(), made["heldout"]
    saved("joined", sae, *((made["store"], site) for site in SITES))
    found, markdown = report()
    f = sae.encode(torch.cat([rows_of(text, text.model, site) for site in SITES], 1))
    fires = (f > 0).any(0).numpy()
    norms = np.stack([part.norm(dim=1).detach().numpy() for part in torch.split(sae.W_dec, WIDTH, 1)])
    share = (norms / norms.sum(0))[:, fires]
    (entry,) = found["crosscoders"]
    assert not fires[11] and entry["silent"] == int((~fires).sum()) and entry["latents"] == 12
    assert [site["only"] for site in entry["sites"]] == [int(fires[:4].sum()), int(fires[4:6].sum())]
    assert entry["shared"] == int((share.min(0) >= 0.25).sum()) > 0
    assert entry["shared"] + entry["between"] + fires[:6].sum() == fires.sum()
    histogram = entry["sites"][1]["histogram"]
    assert len(histogram) == 20 and sum(histogram) == fires.sum() and histogram[0] == fires[:4].sum()
    assert entry["sites"][1]["share"] == pytest.approx(float(share[1].mean()))
    (plot,) = entry["plots"]
    assert (tmp_path / "out" / plot).is_file() and plot in markdown
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Where the latents write" in page and "share of resid_post.1 in a latent" in page


def test_a_crosscoder_of_two_models_reads_both_and_is_spliced_into_each(
    saved: Save, report: Callable[..., tuple[dict[str, Any], str]], made: dict[str, Any]
) -> None:
    sae, text = rough(4), made["heldout"]
    saved("models", sae, (made["store"], SITES[0]), (made["other"], SITES[0]))
    found, _ = report()
    models = [text.model, made["tuned"]]
    x = [rows_of(text, model, SITES[0]) for model in models]
    x_hat = sae(torch.cat(x, 1))
    scored = {site["store"]: site for site in found["sites"]}
    for place, (store, model) in enumerate(zip((made["store"], made["other"]), models, strict=True)):
        (row,) = scored[store.manifest.folder]["saes"]
        part = x_hat[:, place * WIDTH : (place + 1) * WIDTH]
        nmse = (x[place] - part).double().square().sum() / (x[place] - x[place].mean(0)).double().square().sum()
        assert value(row, "nmse") == pytest.approx(float(nmse), rel=1e-4)
        assert value(row, "ce_spliced") == pytest.approx(cross_entropy(text, model, SITES[0], part), abs=1e-4)
    (entry,) = found["crosscoders"]
    assert [site["site"] for site in entry["sites"]] == [
        f"{SITES[0]} of {store.manifest.folder}" for store in (made["store"], made["other"])
    ]


@pytest.mark.parametrize(
    "settings", [{"together": True}, {"features": "best"}, {"features": "joined"}, {"feature_metrics": ["ablation"]}]
)
def test_what_is_of_one_site_is_refused(
    saved: Save, report: Callable[..., tuple[dict[str, Any], str]], made: dict[str, Any], settings: dict[str, Any]
) -> None:
    saved("joined", rough(), *((made["store"], site) for site in SITES))
    (name,) = settings
    with pytest.raises(UserError, match=rf"{name} is of SAEs of one site, and .* is a crosscoder of resid_post\.0 \+"):
        report(**settings)


def test_rows_left_out_in_training_are_those_massive_at_any_site_of_the_store(
    saved: Save, made: dict[str, Any]
) -> None:
    folder = saved("joined", rough(), (made["store"], SITES[0]), (made["other"], SITES[0]), (made["store"], SITES[1]))
    config = load_config(folder) | {"training": {"outliers": {"times": 10, "median": 2.0, "medians": [2.0, 3.0, 5.0]}}}
    for part in (0, 2):
        assert rules_of(SavedSAE(folder, config, part)) == {
            SITES[0]: MassiveRule(10.0, 2.0),
            SITES[1]: MassiveRule(10.0, 5.0),
        }
    assert rules_of(SavedSAE(folder, config, 1)) == {SITES[0]: MassiveRule(10.0, 3.0)}
    without = config | {"training": {}}
    assert rules_of(SavedSAE(folder, without, 1)) == {SITES[0]: None}


def test_pages_of_latents_are_refused(saved: Save, made: dict[str, Any], tmp_path: Path) -> None:
    folder = saved("joined", rough(), *((made["store"], site) for site in SITES))
    with pytest.raises(
        UserError, match=r"is a crosscoder of resid_post.0 \+ resid_post.1, and only evaluate takes one"
    ):
        make(stage_config("features", folder=str(folder), cache=made["config"]["cache"], out=str(tmp_path / "pages")))
