"""`python -m train` as a user runs it: a sweep from one cache, the same again, a continuation, a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data.base.cli import CONF
from train.sae import load_config

SMALL = [
    *("batch=64", "tokens=640", "calibration_tokens=256", "heldout_tokens=256", "sae.expansion=2", "sae.k=4"),
    *("trainer=cpu", "loader.pool_chunks=4", "checkpoint_every=5"),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train", *arguments]
    return subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True)


@pytest.mark.slow
def test_a_sweep_is_one_pass_over_the_cache_and_repeats_nothing(cache: Path, tmp_path: Path) -> None:
    sweep = ["-m", f"cache={cache}", f"hydra.sweep.dir={tmp_path}", "sae=topk,batchtopk", *SMALL]
    sweep.remove("sae.k=4")
    done = run(*sweep, "sae.k=2,4")
    assert done.returncode == 0, done.stderr
    folders = {path.parent: load_config(path.parent) for path in tmp_path.rglob("config.json")}
    trained = {(config["variant"], config["settings"]["k"]) for config in folders.values()}
    assert trained == {("topk", 2), ("topk", 4), ("batchtopk", 2), ("batchtopk", 4)}
    assert {folder.parent for folder in folders} == {tmp_path}
    assert all(f"sae.k-{config['settings']['k']}" in folder.name for folder, config in folders.items())
    assert all(f"sae.k={c['settings']['k']}" in (f / ".hydra/overrides.yaml").read_text() for f, c in folders.items())
    summaries = [line for line in done.stdout.splitlines() if "-> " in line]
    assert len(summaries) == 4 and "4 SAEs in one pass" in done.stdout and ", once for 4 SAEs" in done.stdout
    assert "Warning" not in done.stderr and "\r" not in done.stderr
    # The same again with one more k, which fails at once: the rest is there, the sentence and the exit code say it.
    again = run(*sweep, "sae.k=2,4,999")
    assert again.returncode == 1 and again.stdout.count("nothing to do") == 4
    (sentence,) = [line for line in again.stderr.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: 2 of 6 SAEs failed: ") and "(k=999 " in sentence
    assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_a_sweep_may_go_one_after_another_or_a_few_at_once(cache: Path, tmp_path: Path) -> None:
    """All three ways leave the same weights; a failure in the first few keeps none of the later from training."""
    sweep = ["-m", f"cache={cache}", "sae=topk", *SMALL, "optimizer.lr=0.001,-1,0.002"]
    ways = {"one": "hydra/launcher=basic", "few": "hydra.sweeper.max_batch_size=2", "all": "hydra/launcher=together"}
    found = {}
    for way, option in ways.items():
        asked = [*sweep[:-1], "optimizer.lr=0.001,0.002"] if way == "one" else sweep
        done = run(*asked, f"hydra.sweep.dir={tmp_path / way}", option)
        assert done.returncode == (0 if way == "one" else 1), done.stderr
        assert way == "one" or "1 of 2 SAEs failed" in done.stderr or "1 of 3 SAEs failed" in done.stderr
        paths = sorted((tmp_path / way).rglob("sae.safetensors"))
        found[way] = [(path.parent.name, path.read_bytes()) for path in paths]
    assert len(found["one"]) == 2 and found["one"] == found["few"] == found["all"]


def test_a_mistake_is_one_sentence(cache: Path, tmp_path: Path) -> None:
    done = run(f"cache={cache}", f"hydra.run.dir={tmp_path}", *SMALL, "site=resid_post.7")
    assert done.returncode == 1
    assert done.stderr.startswith("error: site resid_post.7 is not among the sites (resid_post.3)")
    assert len(done.stderr.splitlines()) == 1
    assert f'make harvest ARGS="cache={cache} sites=[resid_post.7] tokens=' in done.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on(cache: Path, tmp_path: Path) -> None:
    """SIGKILL at some moment after a checkpoint, then `resume=`: the SAE of the uninterrupted run, byte for byte."""
    long = [*SMALL, "sae=topk", "tokens=200_000", "epochs=60", "checkpoint_every=500", f"cache={cache}"]
    assert run(*long, f"hydra.run.dir={tmp_path / 'whole'}").returncode == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "train", *long, f"hydra.run.dir={killed}"]
    process = subprocess.Popen(command, cwd=CONF.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (killed / "config.json").exists()
    done = run(f"resume={killed}", f"hydra.run.dir={tmp_path / 'hydra'}")
    assert done.returncode == 0 and "going on from step" in done.stdout, done.stderr
    assert (killed / "sae.safetensors").read_bytes() == (tmp_path / "whole" / "sae.safetensors").read_bytes()
