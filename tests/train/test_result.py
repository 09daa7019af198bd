"""`train.train` from Python: keyword arguments in, the SAE with its folder and figures out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
from data import UserError
from train.sae import load


def test_a_call_trains_and_gives_the_sae(cache: Path, tmp_path: Path) -> None:
    small = {"batch": 64, "tokens": 640, "calibration_tokens": 256, "heldout_tokens": 256, "trainer": "cpu"}
    done = train.train(
        **small, cache=cache, out=tmp_path / "run", sae="topk", **{"sae.k": 4, "loader": {"pool_chunks": 4}}
    )
    assert isinstance(done, train.TrainResult)
    assert (done.folder, done.record["variant"], done.sae.config.aim) == (tmp_path / "run", "topk", "k=4")
    assert done.heldout["l0"] <= 4
    assert 0 < done.heldout["nmse"] < 1
    assert f"-> {tmp_path / 'run'}" in str(done)
    assert torch.equal(done.sae.W_dec, load(tmp_path / "run").W_dec)
    assert done.sae.record == done.record
    # It goes on with a finished run as the command line does: nothing is left to do.
    assert train.train(resume=tmp_path / "run").record == done.record
    with pytest.raises(UserError, match=r"^batch=0 is not allowed"):
        train.train(cache=cache, out=tmp_path / "other", batch=0)


def test_several_share_a_pass_and_go_on(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"batch": 64, "tokens": 640, "calibration_tokens": 256, "heldout_tokens": 256, "trainer": "cpu"}
    shared = {**small, "cache": cache, "sae.expansion": 2, "loader": {"pool_chunks": 4}}
    variations = [{"sae": "topk", "sae.k": k} for k in (2, 4)]
    runs = train.train_sweep(variations, tmp_path / "sweep", **shared)
    assert [(run.folder.name, run.sae.config.aim) for run in runs] == [("sae.k-2", "k=2"), ("sae.k-4", "k=4")]
    assert "2 SAEs in one pass" in capsys.readouterr().out
    alone = train.train(out=tmp_path / "alone", **shared, **variations[1])
    assert torch.equal(alone.sae.W_dec, runs[1].sae.W_dec)
    capsys.readouterr()
    more = train.train_sweep([*variations, {"sae": "relu", "sae.sparsity": 0.02}], tmp_path / "sweep", **shared)
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert more[2].record["variant"] == "relu"
    with pytest.raises(UserError, match="train_sweep has no variations"):
        train.train_sweep([], tmp_path / "sweep")
