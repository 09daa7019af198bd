"""A run broken off and continued ends bit for bit where the uninterrupted one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base.errors import UserError
from data.loading.reader import open_reader
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import Store
from data.store.zarr_bfloat16 import from_float32
from tests.helpers.runs import (
    SITE,
    Broken,
    D,
    activations,
    assert_same,
    assert_same_sae,
    break_after,
    composed,
    final_state,
    make_store,
    plan_of,
)
from tests.helpers.slow import slow_unless
from train.resume import LAST
from train.run import train
from train.sae import SAE, StepOutput, load
from train.sae.variants.topk import TopK

# 1,536 training rows in batches of 64: an epoch is 24 steps, the run 60. Validation every 8.
LONG = ("tokens=3840", "epochs=3", "calibration_tokens=2560", "validate_every=8", "dead_after=256")


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that draws a random number a step, so that the random state matters."""
    plain = SAE.after_step

    def after_step(self: SAE, step: StepOutput) -> None:
        plain(self, step)
        with torch.no_grad():
            self.b_dec += 1e-3 * torch.randn_like(self.b_dec)

    monkeypatch.setattr(TopK, "after_step", after_step)


# Mid-epoch off and on a validation step; around and on an epoch's last step (a validation step too); the very end.
BREAKS = {
    "topk": (5, 23, 24, 25, 60),
    "batchtopk": (16, 24),
    "batchtopk ema=0.9 lr_at_width=16": (16,),
    "jumprelu": (40,),
}


@pytest.mark.parametrize("variant", slow_unless({"topk", "jumprelu"}.__contains__, BREAKS))
def test_continued_equals_uninterrupted(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noisy: None, variant: str
) -> None:
    asked = (*LONG, *f"sae={variant}".split())
    whole = short(*asked, f"out={tmp_path / 'whole'}")
    train(whole)
    for step in BREAKS[variant]:
        folder = tmp_path / f"broken_{step}"
        settings = short(*asked, f"out={folder}", f"checkpoint_every={step}")
        with monkeypatch.context() as patch, pytest.raises(Broken):
            break_after(patch, step)
            train(settings)
        assert not (folder / "config.json").exists()
        torch.manual_seed(step)
        train(settings)
        assert_same(final_state(folder), final_state(tmp_path / "whole"))
        assert_same_sae(folder, tmp_path / "whole")


@pytest.fixture(scope="module")
def int8_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8")
    make_store(path, composed("out=x"), dtype="float32", encoding="int8", shards=True)
    return path


def test_continued_equals_uninterrupted_over_int8(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8_cache: Path
) -> None:
    over = ("sae=batchtopk", f"cache={int8_cache}")
    train(short(*over, f"out={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short(*over))
    train(short(*over))
    assert_same(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    assert_same_sae(tmp_path / "run", tmp_path / "whole")


def test_training_over_int8_is_training_over_its_values(short: Any, tmp_path: Path, int8_cache: Path) -> None:
    """A store of the decoded values gives the same SAE, threshold and validation, bit for bit."""
    store = plan_of(short(f"cache={int8_cache}")).store
    plain = make_store(tmp_path / "plain", composed("out=x"), name="plain", dtype="float32")
    for split, commits in ((split, plain.committed(split, SITE)) for split in (TRAIN, HELDOUT)):
        reader = open_reader(store, split, SITE)
        rows = torch.empty(int(reader.sizes.sum()), reader.width, dtype=torch.int8)
        for chunk in range(len(reader.sizes)):
            reader.read(chunk, rows.numpy()[64 * chunk :])
        x = store.decoder(split, SITE)(rows).numpy()
        for unit in commits:
            (plain.path / f"commits/{split}/{unit:06d}.{SITE}.json").unlink()
            Store.open(plain.path).write(split, unit, SITE, x[512 * unit : 512 * (unit + 1)], {"device": "cpu"})
    for name, cache in (("int8", int8_cache), ("decoded", tmp_path / "plain")):
        train(short("sae=batchtopk", f"cache={cache}", f"out={tmp_path / name}"))
    assert load(tmp_path / "int8").d_in == D
    own = ("/loader/", "/run", "/seal")  # of the store and its fingerprint
    states = [
        {k: v for k, v in final_state(tmp_path / name).items() if not k.startswith(own)} for name in ("int8", "decoded")
    ]
    assert_same(*states)
    for file in ("sae.safetensors", "metrics.csv"):
        assert (tmp_path / "int8" / file).read_bytes() == (tmp_path / "decoded" / file).read_bytes()


def test_the_comparison_sees_a_difference(short: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        train(short("sae=topk", f"seed={seed}", f"out={tmp_path / name}"))
    with pytest.raises(AssertionError):
        assert_same(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


def test_it_goes_on_from_the_last_checkpoint_not_from_the_start(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short("sae=topk"))
    rates: list[float] = []
    monkeypatch.setattr(TopK, "after_step", lambda self, step: rates.append(0.0))
    train(short(f"resume={tmp_path / 'run'}"), [f"resume={tmp_path / 'run'}"])
    assert len(rates) == 10
    assert "going on from step 20 with topk" in capsys.readouterr().out


def test_resume_keeps_the_run_s_own_settings(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short("sae=topk", "sae.k=3", "seed=4"))
    train(short(f"resume={tmp_path / 'run'}"), [f"resume={tmp_path / 'run'}", "trainer.accelerator=cpu"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["variant"], config["settings"]["k"], config["training"]["seed"]) == ("topk", 3, 4)


def test_a_run_begun_before_dead_latents_were_raised_goes_on_without(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record names no `sae.revive`, whose default has come since."""
    train(short("sae=gated", "sae.revive=0", f"out={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short("sae=gated", "sae.revive=0"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["settings"]["sae"]["revive"]
    assert "revive" not in record["numbers"]["sae"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    train(short(f"resume={tmp_path / 'run'}"), [f"resume={tmp_path / 'run'}"])
    assert_same_sae(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(UserError, match="holds another run"):
        train(short("sae=gated"))


def test_resume_refuses_what_it_would_ignore(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"is not the folder of a training run"):
        train(short(f"resume={run}"), [f"resume={run}"])
    train(short("sae=topk"))
    with pytest.raises(UserError, match=r"would ignore sae\.k=3"):
        train(short(f"resume={run}", "sae.k=3"), [f"resume={run}", "sae.k=3"])
    (run / LAST).unlink()
    with pytest.raises(UserError, match=r"last\.ckpt is missing"):
        train(short(f"resume={run}"), [f"resume={run}"])


def test_the_same_run_again_does_nothing_and_another_is_refused(
    short: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(short("sae=topk", "sae.k=4"))
    before = (tmp_path / "run" / "sae.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    train(short("sae=topk", "sae.k=4", "log_every=7"))
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "sae.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds another run \(sae\.k: 4 here, 5 asked\).*hydra\.run\.dir"):
        train(short("sae=topk", "sae.k=5"))


def test_a_checkpoint_is_whole_or_the_one_before(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = torch.save

    def torn(state: Any, file: Any) -> None:
        if isinstance(state, dict) and state.get("step") == 20:
            file.write(b"half")
            raise Broken
        saved(state, file)

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(Broken):
        train(short("sae=topk"))
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["step"] == 10


def test_a_run_goes_on_bit_equal_after_its_store_grew(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_maker: Callable[..., Store]
) -> None:
    settings = short(*LONG, "sae=batchtopk")
    store = store_maker(tmp_path / "own", settings)
    own = [*LONG, "sae=batchtopk", f"cache={tmp_path / 'own'}"]
    train(short(*own, f"out={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short(*own, f"out={tmp_path / 'broken'}"))
    units, rows = len(store.committed(TRAIN, SITE)), store.layout.unit_rows
    store.require(TRAIN, SITE, D, (units + 1) * rows)
    store.write(TRAIN, units, SITE, from_float32(activations(rows, 9)), {"device": "cpu"})
    train(short(*own, f"out={tmp_path / 'broken'}"))
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "broken"))
    weights = [(tmp_path / name / "sae.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_too_few_rows_to_calibrate_are_refused_before_the_training(short: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"calibration_tokens=0 sets 0 rows aside, fewer than one batch=64"):
        train(short("sae=batchtopk", "calibration_tokens=0"))
    assert not (tmp_path / "run").exists()
    train(short("sae=topk", "calibration_tokens=0"))
    assert (tmp_path / "run" / "sae.safetensors").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_refused_by_name(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short("sae=topk"))
    path = tmp_path / "run" / LAST
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-100])
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        train(short("sae=topk"))
