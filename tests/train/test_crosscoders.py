"""python -m pytest tests/train/test_crosscoders.py: crosscoders from the command line's settings to their folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.base.errors import UserError
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import TOKENS, Store
from tests.helpers.runs import (
    ROWS,
    SITE,
    TARGET,
    Broken,
    Compose,
    D,
    E,
    add_target,
    assert_same,
    assert_same_sae,
    break_after,
    composed,
    final_state,
    make_store,
    plan_of,
    short_run,
)
from tests.helpers.slow import slow_unless
from train.datamodule import ActivationData
from train.interop.export import export
from train.messages import opening
from train.run import TrainRequest, prepare, train, train_all
from train.sae import load, load_config

BOTH = f"site=[{SITE},{TARGET}]"
VARIANTS = {
    "relu": ["sae.k=6"],
    "topk": ["sae.k=3", "dead_after=256"],
    "batchtopk": ["ema=0.9", "clip=null"],
    "matryoshka": ["dead_after=256"],
    "gated": ["sae.sparsity=0.05"],
    "jumprelu": ["sae.k=5"],
}


def add_tokens(store: Store, odd: int | None = None) -> None:
    """Say which token each row is; one of train/ is another where `odd` says which."""
    for split in (TRAIN, HELDOUT):
        ids = np.arange(ROWS[split], dtype=np.int32) % 997
        if odd is not None and split == TRAIN:
            ids[odd] += 1
        store.require(split, TOKENS, 1, len(ids))
        for unit in range(len(ids) // store.layout.unit_rows):
            part = slice(unit * store.layout.unit_rows, (unit + 1) * store.layout.unit_rows)
            store.write(split, unit, TOKENS, ids[part], {})


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """Stores of two models over one text, the first of two sites; and one of a text that differs in one token."""
    path = tmp_path_factory.mktemp("joined")
    made = {name: make_store(path / name, composed("out=x"), name=name) for name in ("base", "tuned", "odd")}
    add_target(made["base"])
    for name, store in made.items():
        add_tokens(store, 700 if name == "odd" else None)
    return made


@pytest.fixture
def short(stores: dict[str, Store], tmp_path: Path) -> Compose:
    run: Callable[..., Any] = partial(short_run, Path(str(stores["base"].path)).parent, tmp_path / "run")
    return run


@pytest.mark.parametrize("variant", slow_unless({"batchtopk", "gated"}.__contains__, VARIANTS))
def test_continued_equals_uninterrupted(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    asked = (f"sae={variant}", *VARIANTS[variant], BOTH)
    train(short(*asked, f"out={tmp_path / 'whole'}"))
    broken = short(*asked, "checkpoint_every=20")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(broken)
    done = train(broken)
    assert_same(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    assert_same_sae(tmp_path / "run", tmp_path / "whole")
    config = load_config(tmp_path / "run")
    assert [site["site"] for site in config["sites"]] == [SITE, TARGET] and "site" not in config
    assert config["settings"]["site_widths"] == [D, E] and config["settings"]["width"] == 4 * D
    assert config["training"]["heldout"]["nmse"] < 0.8
    assert f"at {SITE} + {TARGET}" in str(done)


def test_rows_have_the_sites_side_by_side_and_the_figures_are_of_all(short: Any, tmp_path: Path) -> None:
    settings = short("sae=topk", BOTH, "heldout_tokens=1024", "batch=64")
    train(settings)
    sae, data = load(tmp_path / "run"), ActivationData(plan_of(settings), seed=0)
    x = torch.cat([data.model_units(batch).x_BD for batch in data.val_dataloader()])
    parts = []
    for site in (SITE, TARGET):
        alone = ActivationData(plan_of(short("sae=topk", f"site={site}", "heldout_tokens=1024", "batch=64")), seed=0)
        parts.append(torch.cat([alone.model_units(batch).x_BD for batch in alone.val_dataloader()]))
    assert torch.equal(x, torch.cat(parts, 1))
    # Each site counts in its normalised units, or the larger one would be nearly all of it.
    xn, xn_hat = sae.norm.normalise(x), sae.norm.normalise(sae(x))
    error = (xn_hat - xn).double().square().sum() / (xn - xn.mean(0)).double().square().sum()
    assert load_config(tmp_path / "run")["training"]["heldout"]["nmse"] == pytest.approx(float(error), rel=1e-5)


def test_a_list_of_one_is_its_site(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk", f"site=[{SITE}]", f"out={tmp_path / 'one'}"))
    train(short("sae=topk", f"site={SITE}", f"out={tmp_path / 'plain'}"))
    assert_same_sae(tmp_path / "one", tmp_path / "plain")


def test_a_sweep_trains_crosscoders_and_saes_apart(
    short: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"joined": BOTH, "plain": f"site={SITE}"}
    train_all([TrainRequest(short("sae=topk", site, f"out={tmp_path / name}")) for name, site in asked.items()])
    out = capsys.readouterr().out
    assert "2 SAEs in 2 passes over the cache, as they differ in site" in out and f"{SITE} + {TARGET}" in out
    assert load(tmp_path / "joined").site_widths == (D, E) and load(tmp_path / "plain").site_widths is None


def test_two_stores_of_the_same_tokens_are_sites_of_one_crosscoder(
    short: Any, stores: dict[str, Store], tmp_path: Path
) -> None:
    both = f"store=[{stores['base'].path},{stores['tuned'].path}]"
    train(short("sae=batchtopk", both, f"site={SITE}"))
    config = load_config(tmp_path / "run")
    assert [site["model_name"] for site in config["sites"]] == ["base", "tuned"]
    assert config["sites"][0]["fingerprint"] != config["sites"][1]["fingerprint"]
    sae = load(tmp_path / "run")
    assert sae.site == f"{SITE} of {stores['base'].path.name} + {SITE} of {stores['tuned'].path.name}"
    # The two stores hold the same activations here: what the latents give of them is nearly the same.
    assert sae.site_widths == (D, D)


def test_stores_of_other_tokens_are_refused(short: Any, stores: dict[str, Store]) -> None:
    with pytest.raises(UserError, match="hold different tokens in chunk 10 of train: sites of several stores need"):
        train(short("sae=topk", f"store=[{stores['base'].path},{stores['odd'].path}]", f"site={SITE}"))
    with pytest.raises(UserError, match="names one store twice"):
        train(short("sae=topk", f"store=[{stores['base'].path},{stores['base'].path}/]", f"site={SITE}"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ((BOTH, "target=mlp_out.3"), "a crosscoder reconstructs all of its own: leave target out"),
        ((f"site=[{SITE},{SITE}]",), "names one of its entries twice"),
        ((f"site=[{SITE},blocks.3.hook_resid_post]",), "names one site twice"),
        (
            (f"site=[{SITE},resid_post.9]",),
            r"site resid_post.9 is not among the sites .*sites=\[resid_post.3,resid_post.9",
        ),
        ((BOTH, "sae=topk", "sae.skip=true"), r"sae\.skip is a path from a transcoder's input"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(short: Any, overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        train(short(*overrides))


@pytest.fixture
def sunk(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A cache whose store has massive rows, every 64th at one site and every 48th at the other; which they are."""
    store = make_store(tmp_path / "cache", composed("out=x"), sink_every=64)
    add_target(store, sink_every=48)
    rows = np.arange(ROWS[TRAIN])
    return tmp_path / "cache", (rows % 64 == 0) | (rows % 48 == 0)


def test_rows_that_are_massive_at_any_site_are_left_out(sunk: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    cache, massive = sunk
    settings = short_run(cache, tmp_path / "run", BOTH, "sae=topk", "outliers=auto")
    plan = plan_of(settings)
    assert plan.outliers is not None and plan.outliers.left_out[TRAIN] == massive.sum()
    x = ActivationData(plan, seed=0).sample(10**6).x_BD
    assert float(x[:, :D].norm(dim=1).max()) < 1000 and float(x[:, D:].norm(dim=1).max()) < 10_000
    every = plan.readers[TRAIN].sizes.sum()
    assert every == (~massive).sum()
    # The moments are those of the rows that stay, at each site, which a mean of x_s over all of them shows.
    means = plan.moments()["mean_sq_norm"]
    assert isinstance(means, list) and max(means) < 1000**2
    train(settings)
    outliers = load_config(tmp_path / "run")["training"]["outliers"]
    assert outliers["times"] == 10 and len(outliers["medians"]) == 2 and outliers["median"] == outliers["medians"][0]
    scale = load(tmp_path / "run").norm.scale.double().square()
    np.testing.assert_allclose(np.array(means) * scale.numpy(), [D, E], rtol=1e-5)


def test_an_export_names_what_no_format_holds(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk", BOTH))
    for to in ("saelens", "sparsify", "dictionary_learning"):
        with pytest.raises(UserError, match=f"is a crosscoder of {SITE} \\+ {TARGET}, and no format of other tools"):
            export(tmp_path / "run", to, tmp_path / "out")


def test_the_opening_line_names_all_sites(short: Any) -> None:
    run = prepare(TrainRequest(short("sae=topk", BOTH)))
    assert run is not None and f"{SITE} + {TARGET} (" in opening([run])
