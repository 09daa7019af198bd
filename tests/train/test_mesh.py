"""A dictionary split over processes: trained from the command line, broken off, gone on with by any number of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base.cli import CONF
from data.base.errors import UserError
from tests.helpers.runs import assert_same_sae
from train.callbacks import write_checkpoint
from train.config import TrainSettings
from train.mesh import latent_split
from train.optimizers import OPTIMIZERS
from train.resume import LAST, read_tensors
from train.run import prepare, train
from train.sae import VARIANTS, load
from train.sae.parts.split import WHOLE, LatentSplit
from train.sae_trainer import SAETrainer
from train.schedules import Schedule
from train.shards import OF_PART, SHARDS, divide, own_state

D, F = 6, 23


def trainer_of(split: LatentSplit) -> SAETrainer:
    """A member whose weights, moments, counters and mean are those of the latents it holds, told by their numbers."""
    sae = VARIANTS["jumprelu"](D, width=F, split=split, sparsity=0.1)
    member = SAETrainer(
        sae,
        lambda groups: OPTIMIZERS["adam"](groups, lr=0.1),
        Schedule.of_shares(9, 0, 0, 0),
        folder=Path("nowhere"),
        name="x",
        seed=0,
        dead_after=10,
        ema=0.9,
        fingerprint="abc",
    )
    latents = split.latent(torch.arange(sae.own_width)).float()
    for name, parameter in sae.named_parameters():
        parameter.grad = torch.ones_like(parameter) if name == "b_dec" else (parameter.t() * 0 + latents).t()
    member.optimizer.step()
    member.dead.since_F.copy_(latents)
    assert member.average is not None
    member.average.update(sae, member.average.gain(1))
    member.step = 7
    return member


def written(folder: Path, ranks: int) -> dict[str, Any]:
    """Write the files of the parts of so many processes; gives the index."""
    for rank in range(ranks):
        index, part = divide({**trainer_of(LatentSplit(ranks, rank)).state(), "loader": {}}, LatentSplit(ranks, rank))
        write_checkpoint(folder / index[SHARDS][rank], part)
    return index


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (4, 2)])
def test_any_number_of_processes_goes_on(tmp_path: Path, before: int, after: int) -> None:
    state = {**trainer_of(WHOLE).state(), "loader": {}} if before == 1 else written(tmp_path, before)
    for rank in range(after):
        split = LatentSplit(after, rank)
        member = trainer_of(split)
        found = own_state(member.sae, state, tmp_path, read_tensors, average=True)
        wanted = member.state()
        for name in OF_PART:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)
        assert found["step"] == 7 and found["run"] == "abc"
        member.load(found)


def test_a_checkpoint_s_parts_must_be_its_own(tmp_path: Path) -> None:
    state = written(tmp_path, 2)
    sae = trainer_of(WHOLE).sae
    part = tmp_path / state[SHARDS][1]
    content = read_tensors(part)
    for wrong in ({**content, "step": 6}, {**content, "run": "other"}, {**content, "rank": 0}, [1]):
        write_checkpoint(part, wrong)
        with pytest.raises(UserError, match=r"1-of-2\.ckpt is damaged or of another checkpoint: put it back, or"):
            own_state(sae, state, tmp_path, read_tensors, average=True)
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        own_state(sae, state, tmp_path, read_tensors, average=True)
    part.unlink()
    with pytest.raises(UserError, match=r"1-of-2\.ckpt is missing, a part of the checkpoint"):
        own_state(sae, state, tmp_path, read_tensors, average=True)
    with pytest.raises(UserError, match="damaged index"):
        own_state(sae, {**state, SHARDS: ["../../elsewhere", "x"]}, tmp_path, read_tensors, average=True)


def test_an_optimizer_without_rows_of_latents_keeps_its_number(tmp_path: Path) -> None:
    state = written(tmp_path, 2)
    for name in state[SHARDS]:
        part = read_tensors(tmp_path / name)
        part["optimizer"]["state"][0]["absmax"] = torch.ones(1)  # of a block of entries, as adam8bit's
        write_checkpoint(tmp_path / name, part)
    with pytest.raises(UserError, match=r"cannot go on with another trainer\.latent_ranks: give the one it had"):
        own_state(trainer_of(WHOLE).sae, state, tmp_path, read_tensors, average=True)


def test_what_cannot_be_split_is_refused(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    two = ("trainer.devices=2", "trainer.latent_ranks=2")
    with pytest.raises(UserError, match=r"latent_ranks=2 does not divide the 3 processes"):
        train(short("sae=topk", "trainer.devices=3", "trainer.latent_ranks=2"))
    with pytest.raises(UserError, match=r"needs 2 processes and there is 1 process: start it with torchrun --nproc"):
        train(short("sae=topk", *two))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"needs 2 processes and there is 3 processes"):
        train(short("sae=topk", *two))
    with pytest.raises(UserError, match=r"3 latents cannot be split over 4 processes: lower trainer\.latent_ranks"):
        VARIANTS["relu"](D, width=3, split=LatentSplit(4, 0), sparsity=0.1)
    untied = VARIANTS["topk"](D, width=8, k=2, tied_init=False, split=LatentSplit(2, 0))
    with pytest.raises(UserError, match=r"sae\.tied_init=false .* leave it out with trainer\.latent_ranks"):
        untied.start_encoder()


def test_the_ranks_of_a_mesh(short: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    six = short("trainer.devices=6", "trainer.latent_ranks=3", "batch=32")
    settings = TrainSettings.of(six)
    assert (settings.processes, settings.world) == (6, 2)
    for process in range(6):
        monkeypatch.setenv("RANK", str(process))
        split = latent_split(settings)
        assert (split.size, split.rank) == (3, process % 3)


SMALL = [
    *("batch=32", "tokens=6400", "epochs=2", "calibration_tokens=256", "heldout_tokens=256", "sae.expansion=2"),
    *("sae.k=4", "loader.pool_chunks=4", "checkpoint_every=20", "trainer=cpu", "ema=0.9", "dead_after=500"),
]
COMMAND = [sys.executable, "-m"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def started(ranks: int, *arguments: str) -> subprocess.Popen[str]:
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return subprocess.Popen(
        [*COMMAND, *launcher, "train", *arguments],
        cwd=CONF.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT,
    )


def done(ranks: int, *arguments: str) -> str:
    process = started(ranks, *arguments)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def rank_of(pid: int) -> str | None:
    """The rank that torchrun gave a process; None of other processes."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    ranks = [item[5:].decode() for item in environment if item.startswith(b"RANK=")]
    return ranks[0] if ranks else None


def children(process: subprocess.Popen[str]) -> dict[str, int]:
    """The ranks that a torchrun has started, by number."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {rank: int(pid) for pid in listed if (rank := rank_of(int(pid))) is not None}


def close(folder: Path, other: Path) -> None:
    """The two SAEs are equal but for rounding."""
    torch.testing.assert_close(load(folder).state_dict(), load(other).state_dict(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_and_any_number_goes_on(cache: Path, tmp_path: Path) -> None:
    arguments = ["sae=batchtopk", f"cache={cache}", *SMALL]
    split = ["trainer.devices=2", "trainer.latent_ranks=2"]
    out = done(2, *arguments, *split, f"hydra.run.dir={tmp_path / 'whole'}")
    assert "2 processes hold the latents of one dictionary" in out
    done(1, *arguments, f"hydra.run.dir={tmp_path / 'one'}")
    close(tmp_path / "whole", tmp_path / "one")

    for name, resumed_with, ranks in (("same", [], 2), ("fewer", ["trainer.devices=1", "trainer.latent_ranks=1"], 1)):
        folder = tmp_path / name
        process = started(2, *arguments, *split, f"hydra.run.dir={folder}")
        while not (folder / LAST).exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(children(process)["1"], 9)
        out, _ = process.communicate(timeout=300)  # a minute is promised; a loaded machine may take longer
        assert process.returncode == 1
        assert "another process of this training has ended; step " in out
        assert f"torchrun --nproc-per-node 2 -m train resume={folder}" in out
        assert not (folder / "config.json").exists()
        if ranks == 2:  # one process cannot read its part: none goes on, and none waits for ever
            (part,) = (folder / "checkpoints").glob("last.*.1-of-2.ckpt")
            content = part.read_bytes()
            part.write_bytes(content[:-1])
            process = started(2, f"resume={folder}")
            out, _ = process.communicate()
            assert process.returncode == 1 and "is damaged or of another checkpoint: put it back" in out
            part.write_bytes(content)
        done(ranks, f"resume={folder}", *resumed_with)
        if ranks == 2:
            assert_same_sae(folder, tmp_path / "whole")
        close(folder, tmp_path / "whole")
    assert {path.name for path in (tmp_path / "fewer" / "checkpoints").glob("*.ckpt")} == {"last.ckpt"}


@pytest.mark.slow
def test_a_mesh_of_rows_and_latents_is_one_batch_and_one_dictionary(cache: Path, tmp_path: Path) -> None:
    for variant in ("batchtopk", "gated"):
        small = [item for item in SMALL if variant == "batchtopk" or not item.startswith("sae.k")]
        target = [] if variant == "batchtopk" else ["sae.target_l0=4", "sae.sparsity=0.02"]
        arguments = [f"sae={variant}", *target, f"cache={cache}", *small]
        four = ["trainer.devices=4", "trainer.latent_ranks=2", "batch=16"]
        done(4, *arguments, *four, f"hydra.run.dir={tmp_path / variant}")
        two = ["trainer.devices=2", "batch=16"]
        done(2, *arguments, *two, f"hydra.run.dir={tmp_path / f'{variant} by rows'}")
        close(tmp_path / variant, tmp_path / f"{variant} by rows")


@pytest.mark.slow
def test_a_sweep_trains_split_saes_in_one_pass(cache: Path, tmp_path: Path) -> None:
    arguments = ["-m", "sae=topk,batchtopk", "trainer.devices=2", "trainer.latent_ranks=2", f"cache={cache}", *SMALL]
    assert done(2, *arguments, f"hydra.sweep.dir={tmp_path}").count("2 SAEs in one pass") == 1
    assert sorted(load(path.parent).name for path in tmp_path.rglob("config.json")) == ["batchtopk", "topk"]


def test_split_settings_are_checked_before_a_mesh_is_there(short: Any) -> None:
    """A login node, which has no rank, prepares a split run to hand it on."""
    run = prepare_shapes(short("sae=topk", "trainer.devices=2", "trainer.latent_ranks=2"))
    assert run.sae.W_dec.is_meta


def prepare_shapes(settings: Any) -> Any:
    from train.run import TrainRequest

    run = prepare(TrainRequest(settings), shapes_only=True)
    assert run is not None
    return run
