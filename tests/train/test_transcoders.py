"""python -m pytest tests/train/test_transcoders.py: transcoders from the command line's settings to their folders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base.errors import UserError
from data.loading.loader import ActivationLoader
from data.store.manifest import HELDOUT, TRAIN
from tests.helpers.runs import (
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
from train.config import TrainSettings
from train.datamodule import ActivationData
from train.messages import opening
from train.plan import group_by_stream
from train.resume import numbers
from train.run import TrainRequest, prepare, train, train_all
from train.sae import load, load_config

VARIANTS = {
    "relu": ["sae.k=6"],
    "topk": ["sae.k=3", "sae.skip=true", "dead_after=256"],
    "batchtopk": ["ema=0.9", "clip=null"],
    "matryoshka": ["dead_after=256", "sae.skip=true", "matmul=bf16"],
    "gated": ["sae.skip=true", "ema=0.9"],
    "jumprelu": ["sae.k=5"],
}


@pytest.fixture(scope="module")
def two_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one store of two sites."""
    path = tmp_path_factory.mktemp("pairs")
    add_target(make_store(path, composed("out=x")))
    return path


@pytest.fixture
def short(two_sites: Path, tmp_path: Path) -> Compose:
    """Settings of a short run of transcoders from SITE to TARGET into `<tmp>/run`."""
    run: Callable[..., Any] = partial(short_run, two_sites, tmp_path / "run", f"target={TARGET}")
    return run


@pytest.mark.parametrize("variant", slow_unless({"batchtopk", "gated"}.__contains__, VARIANTS))
def test_continued_equals_uninterrupted(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    asked = (f"sae={variant}", *VARIANTS[variant])
    train(short(*asked, f"out={tmp_path / 'whole'}"))
    broken = short(*asked, "checkpoint_every=20")
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(broken)
    train(broken)
    assert_same(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    assert_same_sae(tmp_path / "run", tmp_path / "whole")
    config = load_config(tmp_path / "run")
    assert (config["site"], config["target"], config["settings"]["d_out"]) == (SITE, TARGET, E)
    assert config["settings"]["skip"] is ("sae.skip=true" in asked)
    assert config["settings"]["apply_b_dec_to_input"] is False
    # Half of the variance in 30 steps, on held-out rows, of the target.
    assert config["training"]["heldout"]["nmse"] < 0.7


def test_the_figures_on_held_out_rows_are_of_the_target(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk", "heldout_tokens=1024"))
    sae = load(tmp_path / "run")
    settings = short("sae=topk", "heldout_tokens=1024", "batch=64")
    x, y = heldout(settings)
    error = (sae(x) - y).double().square().sum() / (y - y.mean(0)).double().square().sum()
    assert load_config(tmp_path / "run")["training"]["heldout"]["nmse"] == pytest.approx(float(error), rel=1e-5)
    l0 = (sae.encode(x) > 0).sum(1).double().mean()
    assert load_config(tmp_path / "run")["training"]["heldout"]["l0"] == pytest.approx(float(l0))


def heldout(settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    data = ActivationData(plan_of(settings), seed=0)
    batches = [data.model_units(batch) for batch in data.val_dataloader()]
    targets = [batch.target_BE for batch in batches if batch.target_BE is not None]
    return torch.cat([batch.x_BD for batch in batches]), torch.cat(targets)


def test_many_transcoders_are_trained_in_one_pass_and_each_as_alone(
    short: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {
        name: [f"sae={name}", *VARIANTS[name], "matmul=float32"] for name in ("topk", "batchtopk", "gated", "relu")
    }
    jobs = [TrainRequest(short(*asked, f"out={tmp_path / 'sweep' / name}")) for name, asked in kinds.items()]
    train_all(jobs)
    out = capsys.readouterr().out
    assert f"4 SAEs in one pass: 1,920 tokens in 30 steps from {plan_of(jobs[0].settings).store.path}" in out
    assert f"{SITE} -> {TARGET}" in out and ", once for 4 SAEs" in out
    for name in ("topk", "batchtopk"):
        train(short(*kinds[name], f"out={tmp_path / 'alone' / name}"))
        assert_same_sae(tmp_path / "sweep" / name, tmp_path / "alone" / name)


def test_a_sweep_over_layers_pairs_each_site_with_the_target_of_its_layer(short: Any, tmp_path: Path) -> None:
    """`site=a.3,a.5 target=mlp_out`: a pass for each pair, and an SAE of the same site has one of its own."""
    cache = tmp_path / "cache"
    store = make_store(cache, composed("out=x"))
    for name in ("mlp_out.3", "mlp_out.5", "resid_pre.5"):
        add_target(store, name)
    over = {
        "a": ["site=resid_post.3", "target=mlp_out"],
        "b": ["site=resid_pre.5", "target=mlp_out"],
        "c": ["site=blocks.3.hook_resid_post", "target=blocks.3.hook_mlp_out", "sae=topk"],
        "d": ["site=resid_post.3", "target=null"],
    }
    runs = [prepare(TrainRequest(short(f"cache={cache}", *o, f"out={tmp_path / n}"))) for n, o in over.items()]
    groups = [
        [(run.plan.site, run.plan.target, run.settings.target) for run in group]
        for group in group_by_stream([run for run in runs if run is not None])
    ]
    assert groups == [
        [("resid_post.3", "mlp_out.3", "mlp_out.3")] * 2,
        [("resid_pre.5", "mlp_out.5", "mlp_out.5")],
        [("resid_post.3", None, None)],
    ]


def test_rows_are_left_out_by_the_norm_of_the_input(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    add_target(make_store(cache, composed("out=x"), sink_every=64))
    plan = plan_of(short_run(cache, tmp_path / "run", f"target={TARGET}"))
    assert plan.outliers is not None and plan.outliers.left_out == {TRAIN: 64, HELDOUT: 16}
    # The target's own rows are all ordinary: its moments are those of the rows that stay.
    data = ActivationData(plan, seed=0)
    rows = ActivationLoader(plan.readers[TRAIN], batch=64, drop_last=False)
    targets = [data.model_units(batch).target_BE for batch in rows]
    y = torch.cat([target for target in targets if target is not None]).double()
    assert len(y) == 4096 - 64
    moments = plan.target_moments()
    assert moments["mean_sq_norm"] == pytest.approx(float(y.square().sum(1).mean()), rel=1e-6)
    assert moments["variance"] == pytest.approx(float((y - y.mean(0)).square().sum(1).mean()), rel=1e-6)


def test_rows_that_are_massive_at_the_target_alone_are_left_out(tmp_path: Path) -> None:
    """The norm of the input is ordinary there, and with them the target's variance would be that of these rows."""
    cache = tmp_path / "cache"
    add_target(make_store(cache, composed("out=x")), sink_every=64)
    run = prepare(TrainRequest(short_run(cache, tmp_path / "run", f"target={TARGET}")))
    assert run is not None and run.settings.outliers == 10.0
    plan = run.plan
    assert plan.outliers is not None and plan.outliers.left_out == {TRAIN: 64, HELDOUT: 16}
    assert plan.outliers.by_target == 64
    assert f"rows above 10 times the median norm at {SITE} or {TARGET} are left out (64 of train" in opening([run])
    data = ActivationData(plan, seed=0)
    rows = [data.model_units(batch) for batch in ActivationLoader(plan.readers[TRAIN], batch=64, drop_last=False)]
    y = torch.cat([batch.target_BE for batch in rows if batch.target_BE is not None]).double()
    assert len(y) == 4096 - 64 and float(y[:, 0].max()) < 1000  # the massive rows have 40,000 there
    assert plan.target_moments()["mean_sq_norm"] == pytest.approx(float(y.square().sum(1).mean()), rel=1e-6)
    x = torch.cat([batch.x_BD for batch in rows]).double()
    assert plan.moments()["mean_sq_norm"] == pytest.approx(float(x.square().sum(1).mean()), rel=1e-6)
    assert numbers(run.settings, plan)["left_out_by_target"] == 64


def test_where_neither_site_has_massive_rows_every_row_is_read(short: Any) -> None:
    plan = plan_of(short())
    assert plan.outliers is None and "left_out_by_target" not in numbers(TrainSettings.of(short()), plan)


def test_a_folder_says_by_which_norms_its_rows_were_left_out(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    add_target(make_store(cache, composed("out=x")), sink_every=64)
    train(short_run(cache, tmp_path / "run", f"target={TARGET}", "sae=topk"))
    training = load_config(tmp_path / "run")["training"]
    plan = plan_of(short_run(cache, tmp_path / "run", f"target={TARGET}"))
    assert plan.outliers is not None and training["outliers"] == {
        "times": 10.0,
        "median": plan.outliers.median,
        "left_out": {TRAIN: 64, HELDOUT: 16},
        "target_median": plan.outliers.target_median,
        "by_target": 64,
    }
    # With the massive rows the least squared error is that of a transcoder of these alone, read as nearly nothing.
    assert 0.1 < training["heldout"]["nmse"] < 0.7


def test_int8_rows_of_both_sites_are_decoded_by_their_own_scales(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    store = make_store(cache, composed("out=x"), dtype="float32", encoding="int8", shards=True)
    add_target(store)
    x, y = heldout(short_run(cache, tmp_path / "run", f"target={TARGET}"))
    exact = make_store(tmp_path / "exact", composed("out=x"), dtype="float32")
    add_target(exact)
    wanted_x, wanted_y = heldout(short_run(tmp_path / "exact", tmp_path / "run", f"target={TARGET}"))
    assert x.shape == (512, D) and y.shape == (512, E)
    for found, wanted in ((x, wanted_x), (y, wanted_y)):
        assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["target=mlp_out.9"], "site mlp_out.9 is not among the sites"),
        ([f"target={SITE}"], "is the site itself"),
        (["target=resid_post"], "is the site itself"),
        (["site=model.norm", "target=mlp_out"], "names none"),
        (["sae.input_norm=token"], "sae.input_norm=dataset"),
        (["sae.skip=true", "target=null"], "give target, or sae.skip=false"),
    ],
)
def test_refusals(short: Any, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        prepare(TrainRequest(short(*overrides)))


def test_subtracting_b_dec_is_refused_where_it_is_asked_for(short: Any) -> None:
    asked = "sae.apply_b_dec_to_input=true"
    with pytest.raises(UserError, match="the encoder has a centre of its own"):
        prepare(TrainRequest(short(asked), [asked]))


def test_a_missing_target_prints_the_harvest_of_both_sites(short: Any) -> None:
    with pytest.raises(UserError, match=r"sites=\[resid_post.3,mlp_out.9\]"):
        prepare(TrainRequest(short("target=mlp_out.9")))


def test_a_target_without_held_out_rows_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    add_target(make_store(cache, composed("out=x")), splits=(TRAIN,))
    with pytest.raises(UserError, match="asks for more than the 0 held-out tokens"):
        plan_of(short_run(cache, tmp_path / "run", f"target={TARGET}"))


def test_it_starts_from_a_transcoder_of_the_same_target_alone(short: Any, tmp_path: Path) -> None:
    train(short("sae=topk", "sae.skip=true"))
    first = load(tmp_path / "run")
    again = prepare(TrainRequest(short("sae=topk", "sae.skip=true", f"start={tmp_path / 'run'}", "out=again")))
    assert again is not None
    assert_same(dict(again.sae.state_dict()), dict(first.state_dict()))
    for other in (["sae.skip=true", "site=mlp_out.3", "target=resid_post.3"], ["sae.skip=false"], ["target=null"]):
        with pytest.raises(UserError, match="does not fit this run"):
            prepare(TrainRequest(short("sae=topk", *other, f"start={tmp_path / 'run'}", "out=other")))
