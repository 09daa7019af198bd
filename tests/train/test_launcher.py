"""Many SAEs in one pass over the cache: each ends as it would alone, whatever becomes of the others."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.base.cli import CONF
from data.base.errors import UserError
from data.loading.reader import DirectReader
from tests.helpers.runs import Broken, assert_same, assert_same_sae, break_after, final_state
from train.fit import make_member
from train.plan import group_by_stream
from train.resume import LAST
from train.run import TrainRequest, prepare, train, train_all
from train.sae import SAE, StepOutput, load_config
from train.sae.parts.groups import RankGroup
from train.sae.parts.ranks import Mesh
from train.sae.variants.batchtopk import BatchTopK
from train.sae.variants.topk import TopK
from train.sae_trainer import SAETrainer

# Variants with state of every kind: AuxK, thresholds followed and calibrated, a coefficient that follows L0.
KINDS = {
    "topk": ["sae=topk", "sae.k=3", "dead_after=256"],
    "batchtopk": ["sae=batchtopk", "clip=null", "log_every=7"],
    "relu": ["sae=relu", "sae.k=6", "sparsity_warmup=0.3"],
    "gated": ["sae=gated", "sae.width=40", "optimizer.lr=0.01"],
    "jumprelu": ["sae=jumprelu", "sae.input_norm=token", "lr_decay=0.5"],
    "matryoshka": ["sae=matryoshka", "ema=0.9", "lr_at_width=32"],
}
TWO = ["topk", "batchtopk"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant draws a random number a step, so that the random state matters."""
    plain = SAE.after_step

    def after_step(self: SAE, step: StepOutput) -> None:
        plain(self, step)
        with torch.no_grad():
            self.b_dec += 1e-3 * torch.randn_like(self.b_dec)

    for variant in (TopK, BatchTopK):
        monkeypatch.setattr(variant, "after_step", after_step)


@pytest.fixture
def jobs(short: Any, tmp_path: Path) -> Any:
    """Jobs of a sweep into `<tmp>/<sweep>/<kind>`."""

    def make(kinds: list[str], *common: str, sweep: str = "sweep") -> list[TrainRequest]:
        folder = tmp_path / sweep
        return [TrainRequest(short(f"out={folder / kind}", *KINDS[kind], *common), sweep=folder) for kind in kinds]

    return make


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, int]]]:
    """How often each chunk was read from its file."""
    found: Counter[tuple[str, int]] = Counter()
    plain = DirectReader.scatter

    def note(self: DirectReader, chunk: int, *args: Any) -> None:
        found[self.split, chunk] += 1
        plain(self, chunk, *args)

    monkeypatch.setattr(DirectReader, "scatter", note)
    yield found


def alone(jobs: list[TrainRequest]) -> None:
    for job in jobs:
        train(job.settings)


def assert_same_runs(folder: Path, other: Path, kinds: list[str]) -> None:
    for kind in kinds:
        assert_same(final_state(folder / kind), final_state(other / kind))
        assert_same_sae(folder / kind, other / kind)


def test_each_equals_its_run_alone_and_the_cache_is_read_once(
    jobs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noisy: None,
    reads: Counter[tuple[str, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds, long = list(KINDS), ("tokens=2048", "epochs=2", "calibration_tokens=2560", "checkpoint_every=32")
    alone(jobs(kinds[:1], *long, "sae=batchtopk", sweep="one"))
    one = Counter(reads)
    reads.clear()
    floats: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        plain = SAETrainer.training_step
        patch.setattr(SAETrainer, "training_step", lambda self, *batch: (floats.append(batch[0]), plain(self, *batch)))
        train_all(jobs(kinds, *long))
    assert reads == one and len(floats) == 6 * 32 and len({id(x_BD) for x_BD in floats}) == 32
    out = capsys.readouterr()
    assert "6 SAEs in one pass: 2,048 tokens in 32 steps" in out.out and ", once for 6 SAEs" in out.out
    assert "6 SAEs   34%" in out.err and "SAE loss nmse l0 dead lr" in " ".join(out.err.split())
    assert "held-out NMSE of the SAEs at each L0" in out.out
    assert "evaluate them: .venv/bin/python -m evaluate saes=" in out.out
    alone(jobs(kinds, *long, sweep="alone"))
    assert_same_runs(tmp_path / "sweep", tmp_path / "alone", kinds)


def test_the_bytes_that_are_printed_are_those_read(
    jobs: Any, reads: Counter[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    train_all(jobs(TWO, "loader.pool_chunks=100"))
    chunk = 64 * 16 * 2  # rows, entries, bytes: every chunk of the small store is full
    assert f"read {reads.total() * chunk / 1e6:,.1f} MB of the cache, once for 2 SAEs" in capsys.readouterr().out


def test_one_that_fails_is_named_and_the_others_go_on(
    jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ["topk", "batchtopk", "relu", "gated"]
    alone(jobs(["batchtopk", "relu"], sweep="alone"))
    plain, steps = TopK.after_step, iter(range(1000))

    def poison(self: TopK, step: Any) -> None:
        plain(self, step)
        if next(steps) == 11:
            with torch.no_grad():
                self.b_dec.fill_(math.nan)

    monkeypatch.setattr(TopK, "after_step", poison)
    asked = jobs(kinds, "validate_every=14")
    asked[3].settings["sae"]["width"] = -1
    with pytest.raises(UserError) as caught:
        train_all(asked)
    assert str(caught.value) == "2 of 4 SAEs failed: gated, topk (why is said above)"
    err = capsys.readouterr().err
    assert err.count("gated is left out: sae.width=-1") == 1
    assert err.count("topk is stopped, 2 go on: the loss of variant topk was not finite at step 12 (") == 1
    assert torch.load(tmp_path / "sweep" / "topk" / LAST, weights_only=True)["step"] == 10
    assert not (tmp_path / "sweep" / "topk" / "config.json").exists()
    for kind in ("batchtopk", "relu"):
        assert_same(final_state(tmp_path / "sweep" / kind), final_state(tmp_path / "alone" / kind))
        assert (tmp_path / "sweep" / kind / "config.json").exists()


def test_what_fails_all_is_said_once(jobs: Any) -> None:
    with pytest.raises(UserError, match=r"^all 2 SAEs failed: site resid_post\.9 is not among") as caught:
        train_all(jobs(TWO, "site=resid_post.9"))
    assert str(caught.value).count("resid_post.9 is not among") == 1


def test_a_pass_that_all_its_saes_leave_ends(
    jobs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    monkeypatch.setattr(TopK, "after_step", lambda self, step: done.append(self.b_dec.data.fill_(math.nan)))
    with pytest.raises(UserError, match=r"^all 2 SAEs failed: .* \(why is said above\)$"):
        train_all([*jobs(["topk"]), *jobs(["topk"], sweep="second")])
    assert len(done) == 20 and capsys.readouterr().err.count("was not finite at step 1 ") == 2


@pytest.mark.parametrize("step", [20, 30])
def test_a_pass_broken_off_goes_on_and_ends_alike(
    jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noisy: None, step: int
) -> None:
    kinds = ["topk", "batchtopk", "relu"]
    train_all(jobs(kinds, sweep="whole"))
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, step)
        train_all(jobs(kinds))
    folder = tmp_path / "sweep"
    train({**jobs(["topk"])[0].settings, "resume": str(folder / "topk")}, [f"resume={folder / 'topk'}"])
    assert_same_runs(folder, tmp_path / "whole", ["topk"])
    train_all(jobs(kinds))
    assert_same_runs(folder, tmp_path / "whole", kinds)


@pytest.mark.slow
def test_a_kill_between_two_checkpoint_files_still_makes_one_pass(
    jobs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noisy: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The one ahead waits for the others, from the first checkpoint on."""
    train_all(jobs(TWO, sweep="whole"))
    from train import callbacks

    plain, written = callbacks.write_checkpoint, []

    def torn(path: Path, state: Any) -> None:
        written.append(path)
        if len(written) == 4 - 2 * first:
            raise Broken
        plain(path, state)

    for first in (False, True):
        sweep = f"sweep{first}"
        written.clear()
        with monkeypatch.context() as patch, pytest.raises(Broken):
            patch.setattr(callbacks, "write_checkpoint", torn)
            train_all(jobs(TWO, sweep=sweep))
        assert torch.load(tmp_path / sweep / "topk" / LAST, weights_only=True)["step"] == 20 - 10 * first
        capsys.readouterr()
        train_all(jobs(TWO, sweep=sweep))
        assert "2 SAEs in one pass" in capsys.readouterr().out
        assert_same_runs(tmp_path / sweep, tmp_path / "whole", TWO)


def test_one_added_later_is_trained_by_itself(jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_all(jobs(TWO))
    capsys.readouterr()
    train_all(jobs([*TWO, "gated"]))
    out = capsys.readouterr().out
    assert out.count("nothing to do") == 2 and "training gated sparsity=0.02: width 40" in out
    assert load_config(tmp_path / "sweep" / "gated")["training"]["steps"] == 30


def test_streams_that_differ_are_passes_of_their_own(
    jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*jobs(TWO), *jobs(TWO, "seed=1", sweep="seed"), *jobs(["topk"], "batch=32", sweep="batch")]
    train_all(asked)
    out = capsys.readouterr().out
    assert "5 SAEs in 3 passes over the cache, as they differ in tokens, batch, seed" not in out
    assert "5 SAEs in 3 passes over the cache, as they differ in batch, seed" in out
    assert out.count("2 SAEs in one pass") == 2
    alone(jobs(TWO, "seed=1", sweep="alone"))
    assert_same_runs(tmp_path / "seed", tmp_path / "alone", TWO)


def test_another_matmul_is_a_pass_of_its_own(jobs: Any) -> None:
    made = [prepare(job) for job in (*jobs(["topk"]), *jobs(["topk"], "matmul=bf16", sweep="bf16"))]
    assert [len(one) for one in group_by_stream([run for run in made if run is not None])] == [1, 1]


def test_two_jobs_of_one_folder_are_refused(jobs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^1 of 2 SAEs failed: "):
        train_all([*jobs(["topk"]), *jobs(["topk"], "sae.k=4")])
    assert "is the folder of several jobs: make hydra.sweep.subdir tell" in capsys.readouterr().err


def test_an_interrupted_sweep_says_how_to_go_on(
    jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, steps = TopK.after_step, iter(range(1000))

    def ctrl_c(self: TopK, step: Any) -> None:
        plain(self, step)
        if next(steps) == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(TopK, "after_step", ctrl_c)
    with pytest.raises(SystemExit) as ended:
        train_all(jobs(TWO))
    assert ended.value.code == 130
    folder = tmp_path / "sweep"
    out = capsys.readouterr().out
    assert f"the same command and hydra.sweep.dir={folder} " in out and f'ARGS="resume={folder / "topk"}"' in out
    assert "step 10 of 30 is saved" in out


def test_two_ranks_average_their_gradients_and_count_both_batches(
    jobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second rank with the very same batches, played by what the ranks exchange."""
    job = jobs(["topk"], "dead_after=10000")[0]
    run = prepare(job)
    assert run is not None
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    sums: list[Any] = []

    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        sums.append(op)
        if op == dist.ReduceOp.SUM:
            tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, **_: None)
    members = []
    for world in (1, 2):
        member = make_member(replace(run, sae=copy.deepcopy(run.sae)), Mesh(RankGroup(world)))
        member.initialise(torch.cat(batches), 16.0, 16.0)
        for x_BD in batches:
            member.training_step(x_BD)
        members.append(member)
    assert sums.count(dist.ReduceOp.SUM) == 8 * len(list(run.sae.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*(m.sae.state_dict().values() for m in members), strict=True))
    assert torch.equal(2 * members[0].dead.since_F, members[1].dead.since_F)


@pytest.mark.slow
def test_a_sweep_under_two_ranks_equals_a_run_alone_there(cache: Path, tmp_path: Path) -> None:
    small = ["batch=32", "tokens=1280", "calibration_tokens=256", "heldout_tokens=256", "sae.expansion=2", "sae.k=4"]
    paces = ["loader.pool_chunks=4", "checkpoint_every=10", "trainer=cpu", "trainer.devices=2", f"cache={cache}"]

    def ranks(*arguments: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["-m", "train", *arguments, *small, *paces]
        done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, env=os.environ | ONE_THREAD)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = ranks("-m", "sae=batchtopk,relu", f"hydra.sweep.dir={tmp_path}")
    assert out.count("2 SAEs in one pass") == 1
    folders = {load_config(path.parent)["variant"]: path.parent for path in tmp_path.rglob("config.json")}
    assert {load_config(folder)["training"]["world"] for folder in folders.values()} == {2} and len(folders) == 2
    ranks("sae=relu", f"hydra.run.dir={tmp_path / 'alone'}")
    assert_same_sae(folders["relu"], tmp_path / "alone")
