"""The cheap checks: each refusal is one sentence with its remedy, before Lightning is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.base.errors import UserError
from data.loading.order import split_calibration
from data.store.manifest import TRAIN
from data.store.store import Store
from tests.helpers.runs import plan_of
from train.config import check_installed
from train.run import build, train

TOPK = {"variant": "topk", "k": 4, "width": None, "expansion": 8}


def test_the_plan_of_the_small_store(short: Any) -> None:
    plan = plan_of(short())
    assert (plan.steps, plan.batch, plan.world, plan.tokens, plan.d_in) == (30, 64, 1, 1920, 16)
    assert len(plan.reserved) == 8 and len(plan.chunks) == 56 and len(plan.heldout) == 8
    assert not set(plan.reserved) & set(plan.chunks)


def test_all_variants_get_the_same_chunks(short: Any) -> None:
    plans = [plan_of(short(f"sae={variant}")) for variant in ("relu", "batchtopk")]
    assert np.array_equal(plans[0].chunks, plans[1].chunks)
    assert np.array_equal(plans[0].reserved, split_calibration(np.full(64, 64), 512, 0)[1])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["site=resid_post.9"], r"site resid_post\.9 is not among the sites \(resid_post\.3\)"),
        (
            ["tokens=4096"],
            r"tokens=4096 with calibration_tokens=512 needs more than the 4096 training tokens in 1 pass",
        ),
        (["heldout_tokens=2000"], r"asks for more than the 1024 held-out tokens"),
        (["calibration_tokens=4096"], r"needs more than the 4096"),
        (["tokens=63"], r"less than one step of batch=64"),
        (["tokens=0"], r"tokens=0 is not allowed: it should be greater than or equal to 1"),
        (["calibration_tokens=-1"], r"calibration_tokens=-1 is not allowed"),
        (["lr_warmup=5"], r"lr_warmup=5 is not allowed: it should be less than or equal to 1"),
        (["lr_decay=null"], r"lr_decay=null is not allowed: it should be a valid number"),
        (["clip=0"], r"clip=0 is not allowed: it should be greater than 0"),
        (["trainer.accelerator=tpu"], r"trainer\.accelerator=tpu is not allowed: it should be 'auto', 'cpu'"),
        (["clip=abc"], r"clip=abc is not allowed: it should be a valid number"),
        (["dead_after=0"], r"dead_after=0 is not allowed"),
        (["seed=null"], r"seed=null is not allowed: it should be a whole number"),
        (["loader.pool_chunks=1.5"], r"loader\.pool_chunks=1\.5 is not allowed: it should be a whole number"),
        (["loader.preload=disk"], r"loader\.preload=disk is not allowed: it should be 'ram' or 'device'"),
        (["outliers=0.5"], r"outliers=0\.5 is not allowed: it should be 'auto' or greater than or equal to 1"),
        (
            ["outliers=1.3", "heldout_tokens=1024"],
            r"heldout_tokens=1024 with outliers=1\.3 needs more than the \d+ held-out",
        ),
        (["batch=.inf"], r"batch=\.?inf is not allowed"),
        (["trainer.devices=auto"], r"trainer\.devices=auto is not allowed: it should be a whole number"),
        (["+trainer.precision=bf16-true"], r"stay 32-bit here: .* set matmul=bf16"),
        (["+trainer.precision=bf16-mixed"], r"stay 32-bit here: .* set matmul=bf16"),
        (["matmul=fp8"], r"matmul=fp8 is not allowed: it should be 'float32', 'tf32' or 'bf16'"),
        (["+trainer.max_time=00:01:00"], r"trainer\.max_time is no setting: "),
        (["ema=1"], r"ema=1 is not allowed: it should be less than 1"),
        (["ema=2"], r"ema=2 is not allowed: it should be less than 1"),
        (["lr_at_width=0"], r"lr_at_width=0 is not allowed"),
        (["store=/nowhere"], r"/nowhere is not a store"),
    ],
)
def test_refusals(short: Any, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        plan_of(short(*overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["logger=tensorboard", "logger=wandb", "optimizer.name=adam8bit"])
def test_what_is_missing_names_its_extra(short: Any, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, extra = option.split("=")
    asked = short(option)[setting.split(".")[0]]["name"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf'{setting}={extra} is not installed: .*pip install -e "\.\[{extra}\]"'):
        check_installed(asked)


def test_counts_may_be_written_as_floats_and_sites_as_transformer_lens_names(short: Any) -> None:
    plan = plan_of(short("tokens=1.92e3", "site=blocks.3.hook_resid_post"))
    assert (plan.steps, plan.site) == (30, "resid_post.3")


def test_no_store_prints_the_harvest_line(short: Any, tmp_path: Path) -> None:
    overrides = [f"cache={tmp_path}", "packing.context=64", "sae.k=4", "site=resid_mid.2"]
    with pytest.raises(UserError) as caught:
        plan_of(short(*overrides), overrides)
    line = f'make harvest ARGS="cache={tmp_path} packing.context=64 sites=[resid_mid.2] tokens=2554 heldout_tokens=512"'
    assert line in str(caught.value)


def test_what_the_harvest_line_asks_for_is_enough(short: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make harvest") as caught:
        plan_of(short("tokens=4096"), ["model=embedded"])
    rows = int(str(caught.value).split(" tokens=")[-1].split()[0])
    sizes = np.full(-(-rows // 64), 64)
    assert int(sizes[split_calibration(sizes, 512, 0)[0]].sum()) // 64 * 64 >= 4096


def test_a_store_made_with_other_settings_is_named(short: Any, cache: Path) -> None:
    store = next(cache.iterdir())
    asked = [f"store={store}", "packing.context=64", "site=resid_mid.2"]
    with pytest.raises(UserError, match=r"differ from yours: packing\.context: 256 here, 64 asked"):
        plan_of(short(*asked), asked)
    assert plan_of(short(f"store={store}", "packing.context=64")).store.path == store


def test_several_stores_are_listed(short: Any, tmp_path: Path, store_maker: Callable[..., Store]) -> None:
    for name in ("a", "b"):
        store_maker(tmp_path / "two", short(), name=name)
    with pytest.raises(UserError, match=r"2 stores match.*a-.*b-.*store=<name or path>"):
        plan_of(short(f"cache={tmp_path / 'two'}"))


def test_devices_in_a_sweep(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = short("trainer.devices=2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match=r"inside a sweep.*torchrun"):
        plan_of(settings, multirun=True)
    assert plan_of(settings).world == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    plan = plan_of(settings, multirun=True)
    assert (plan.world, plan.steps) == (2, 15)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"expansion": None}, "both null: give one of them"),
        ({"expansion": 1.03}, "not a whole number"),
        ({"expansion": "wide"}, r"sae\.expansion=wide is not allowed: it should be a valid number"),
        ({"width": 100.5}, r"sae\.width=100\.5 is not allowed: it should be a whole number"),
        ({"k": 1.5}, r"sae\.k=1\.5 is not allowed: it should be a whole number"),
        ({"k": None}, r"sae\.k=null is not allowed: it should be a whole number"),
        ({"k": True}, r"sae\.k=true is not allowed: it should be a whole number"),
        ({"auxk_relu": 1}, r"sae\.auxk_relu=1 is not allowed: it should be a valid boolean"),
        ({"width": 32, "k": 33}, r"k=33 .* width of 32"),
        ({"auxk_k": 0}, r"sae\.auxk_k=0 is not allowed: it should be greater than or equal to 1"),
        ({"auxk_over": "batch"}, "auxk_over=batch is trained no more: leave it out"),
        ({"sparsity": 1.0}, r"sae\.sparsity is no setting"),
        ({"variant": "elsewhere.SAE"}, r"choose sae=relu\|topk"),
    ],
)
def test_sae_refusals(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build({**TOPK, **settings}, d_in=16)


def test_the_width_goes_before_the_default_expansion() -> None:
    assert build(TOPK, d_in=16).width == 128
    assert build({**TOPK, "width": 100}, d_in=16, overrides=["sae.width=100"]).width == 100
    with pytest.raises(UserError, match=r"sae\.width=100 and sae\.expansion=8 both"):
        build({**TOPK, "width": 100}, d_in=16, overrides=["sae.width=100", "sae.expansion=8"])
    with pytest.raises(UserError, match=r"sae\.width=null where a preset gives the width"):
        build({**TOPK, "width": 100}, d_in=16, overrides=["+experiment=gao", "sae.expansion=8"])


def test_refused_before_lightning_is_imported(short: Any) -> None:
    script = (
        "import sys, json\n"
        "from data.base.errors import UserError\n"
        "from train.run import train\n"
        "try:\n    train(json.load(sys.stdin))\n"
        "except UserError as error:\n    print(error)\n"
        "print([name for name in ('pytorch_lightning', 'transformers') if name in sys.modules])\n"
    )
    import json

    asked = json.dumps(short("sae=topk", "sae.width=32", "sae.k=33"))
    done = subprocess.run([sys.executable, "-c", script], input=asked, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0].startswith("k=33 ")
    assert done.stdout.splitlines()[1] == "[]"


def test_calibration_rows_are_never_trained_on(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.loading.loader import ActivationLoader
    from data.loading.reader import DirectReader
    from train.datamodule import ActivationData

    read: dict[str, set[int]] = {"train": set(), "calibrate": set()}
    stage = "train"
    plain = DirectReader.scatter

    def note(self: DirectReader, chunk: int, *args: Any) -> None:
        if self.split == TRAIN:
            read[stage].add(chunk)
        plain(self, chunk, *args)

    loader = ActivationData.calibration_loader

    def calibrating(self: ActivationData) -> ActivationLoader:
        nonlocal stage
        stage = "calibrate"
        return loader(self)

    monkeypatch.setattr(DirectReader, "scatter", note)
    monkeypatch.setattr(ActivationData, "calibration_loader", calibrating)
    settings = short("sae=batchtopk", "tokens=3584")
    train(settings)
    plan = plan_of(settings)
    assert read == {"train": set(plan.chunks), "calibrate": set(plan.reserved)}
