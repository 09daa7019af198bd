"""`start=`: a run that begins with the weights of an SAE there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.base.errors import UserError
from tests.helpers.runs import activations
from train.run import TrainRequest, prepare, train
from train.sae import load, load_config, save


@pytest.fixture
def first(short: Any, tmp_path: Path) -> Path:
    run = prepare(TrainRequest(short("sae=batchtopk", f"out={tmp_path / 'first'}")))
    assert run is not None
    run.sae.initialise(torch.from_numpy(activations(512, 5)), seed=3)
    run.sae.get_buffer("skipped_batches").fill_(7)
    save(run.sae, tmp_path / "first", {})
    return tmp_path / "first"


def test_weights_norm_and_threshold_are_the_first_runs(short: Any, first: Path, tmp_path: Path) -> None:
    run = prepare(TrainRequest(short("sae=batchtopk", f"start={first}", f"out={tmp_path / 'b'}")))
    assert run is not None
    given = load(first).state_dict()
    given["skipped_batches"].zero_()
    for name, tensor in run.sae.state_dict().items():
        assert torch.equal(tensor, given[name]), name


def test_the_coefficient_is_this_run_s_own(short: Any, tmp_path: Path) -> None:
    run = prepare(TrainRequest(short("sae=gated", "sae.k=4", f"out={tmp_path / 'first'}")))
    assert run is not None
    run.sae.initialise(torch.from_numpy(activations(512, 5)), seed=3)
    run.sae.get_buffer("sparsity_factor").fill_(5)
    save(run.sae, tmp_path / "first", {})
    run = prepare(TrainRequest(short("sae=gated", f"start={tmp_path / 'first'}", f"out={tmp_path / 'b'}")))
    assert run is not None and run.sae.get_buffer("sparsity_factor") == 1


def test_a_run_at_learning_rate_0_ends_with_the_weights_it_started_from(
    short: Any, first: Path, tmp_path: Path
) -> None:
    train(short("sae=batchtopk", f"start={first}", "optimizer.lr=0"))
    before, after = load(first), load(tmp_path / "run")
    for name in ("W_enc", "b_enc", "b_dec"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert torch.equal(before.norm.scale, after.norm.scale)
    assert load_config(tmp_path / "run")["training"]["tokens"] == 1920


@pytest.mark.parametrize("shard_bytes", [10**9, 1000])
def test_a_process_of_several_takes_its_own_latents(
    short: Any, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    """Of one file or of shards; rows that are not unit are refused by all, whoever has them."""
    given = load(first)
    save(given, first, {}, shard_bytes=shard_bytes)
    long = load(first)
    with torch.no_grad():
        long.W_dec[3] *= 1.5
    save(long, tmp_path / "long", {}, shard_bytes=shard_bytes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    split = ["sae=batchtopk", "trainer.devices=2", "trainer.latent_ranks=2", f"out={tmp_path / 'b'}"]
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        run = prepare(TrainRequest(short(*split, f"start={first}")))
        assert run is not None and torch.equal(run.sae.W_dec, given.W_dec[rank::2])
        assert torch.equal(run.sae.W_enc_FD, given.W_enc_FD[rank::2]) and torch.equal(run.sae.b_dec, given.b_dec)
        with pytest.raises(UserError, match=r"not unit \(by 0\.5\)"):
            prepare(TrainRequest(short(*split, f"start={tmp_path / 'long'}")))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sae=topk"], r"sae is batchtopk there and topk here"),
        (["sae=batchtopk", "sae.expansion=8"], r"sae\.width is 64 there and 128 here"),
        (["sae=batchtopk", "sae.input_norm=none"], r"sae\.input_norm is dataset there and none here"),
        (["sae=batchtopk", "sae.apply_b_dec_to_input=false"], r"apply_b_dec_to_input is True there and False here"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    short: Any, first: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says) as caught:
        prepare(TrainRequest(short(*overrides, f"start={first}", f"out={tmp_path / 'b'}")))
    assert "\n" not in str(caught.value)


def test_rows_that_are_not_unit_are_refused(short: Any, first: Path, tmp_path: Path) -> None:
    sae = load(first)
    with torch.no_grad():
        sae.W_dec[0] *= 1.5
    save(sae, tmp_path / "long", {})
    with pytest.raises(UserError, match=r"not unit \(by 0\.5\)"):
        prepare(TrainRequest(short("sae=batchtopk", f"start={tmp_path / 'long'}", f"out={tmp_path / 'b'}")))
