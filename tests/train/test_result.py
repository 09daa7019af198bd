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
