"""A sweep cut into jobs of Slurm, and how far they are; nothing is trained by the jobs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.base.errors import UserError
from data.slurm.records import JobFolder
from tests.helpers.fake_slurm import FakeSlurm
from train.launcher import SlurmLauncher
from train.run import TrainRequest, prepare, train_all
from train.slurm import main, passes, steps_done

K = (2, 3, 4)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm that cancels each job at once, so that nobody waits for it."""
    fake = FakeSlurm(tmp_path / "bin")
    fake.begin_as("CANCELLED")
    monkeypatch.setenv("PATH", fake.path)
    return fake


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return tmp_path / "sweep"


@pytest.fixture
def requests(short: Any, sweep: Path) -> Any:
    """Three SAEs of one stream."""

    def make(*overrides: str, prefix: str = "") -> list[TrainRequest]:
        places = {k: sweep / f"{prefix}k-{k}" for k in K}
        return [
            TrainRequest(short(f"out={place}", f"sae.k={k}", "sae=topk", *overrides), sweep=sweep)
            for k, place in places.items()
        ]

    return make


def items(sweep: Path) -> list[dict[str, int]]:
    return [dict(ticket.items) for ticket in JobFolder(sweep / "slurm").tickets()]


@pytest.mark.parametrize(
    ("count", "per_job", "shares"),
    [
        (5, None, ["01234"]),
        (5, 2, ["01", "23", "4"]),
        (4, 3, ["01", "23"]),
        (7, 3, ["012", "34", "56"]),
        (2, 9, ["01"]),
        (0, 3, []),
    ],
)
def test_passes_are_as_equal_as_can_be(count: int, per_job: int | None, shares: list[str]) -> None:
    assert ["".join(share) for share in passes([str(i) for i in range(count)], per_job)] == shares


def test_a_sweep_becomes_jobs_of_one_stream_each(slurm: FakeSlurm, requests: Any, sweep: Path) -> None:
    jobs = [*requests(), *requests("seed=1", prefix="seed-1-")]
    with pytest.raises(UserError, match=r"^6 of 6 SAEs failed: its job was cancelled"):
        SlurmLauncher(saes_per_job=2).train(jobs)
    first = [{"k-2": 30, "k-3": 30}, {"k-4": 30}]
    second = [{"seed-1-k-2": 30, "seed-1-k-3": 30}, {"seed-1-k-4": 30}]
    assert items(sweep) == [*first, *second]
    assert "#SBATCH --array=0-3%4" in slurm.script(1)


def test_what_is_trained_has_no_job_and_is_in_the_summary(
    slurm: FakeSlurm, requests: Any, sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_all(requests()[:1])
    capsys.readouterr()
    with pytest.raises(UserError, match=r"^2 of 3 SAEs failed: its job was cancelled"):
        SlurmLauncher().train(requests())
    assert items(sweep) == [{"k-3": 30, "k-4": 30}]
    said = capsys.readouterr()
    assert "  k-2  NMSE " in said.out and "1/3 SAEs done, 0 running, 0 queued, 2 failed  30/90 steps" in said.err
    assert main([str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0/2 SAEs done, 0 running, 0 queued, 2 failed  0/60 steps"
    assert lines[1] == "  k-3  cancelled (its job was cancelled)  0/30 steps"


def test_mistakes_are_seen_before_a_job_is_submitted(slurm: FakeSlurm, requests: Any) -> None:
    with pytest.raises(UserError, match=r"site resid_post\.9 is not among the sites"):
        SlurmLauncher().train(requests("site=resid_post.9"))
    with pytest.raises(UserError, match=r"workers is for a harvest: give a sweep hydra\.launcher\.saes_per_job"):
        SlurmLauncher(workers=2).train(requests())
    with pytest.raises(UserError, match=r"gpus=1 and trainer\.devices=2 are one GPU a process: make them the same"):
        SlurmLauncher().train(requests("trainer.devices=2"))
    assert slurm.jobs() == {}


def test_a_job_has_the_processes_of_its_pass(slurm: FakeSlurm, requests: Any) -> None:
    with pytest.raises(UserError, match="its job was cancelled"):
        SlurmLauncher(gpus=2).train(requests("trainer.devices=2", "trainer.num_nodes=3"))
    script = slurm.script(1)
    assert "--ntasks-per-node=2\n" in script and "--nodes=3\n" in script and "--gpus-per-node=2\n" in script
    assert "srun " in script and " --kill-on-bad-exit=1 " in script


def test_the_machine_that_submits_makes_no_weights(requests: Any) -> None:
    run = prepare(requests()[0], shapes_only=True)
    assert run is not None
    assert all(parameter.is_meta for parameter in run.sae.parameters())


def test_steps_are_read_from_the_last_whole_row(tmp_path: Path) -> None:
    assert steps_done(tmp_path, 100) == 0
    (tmp_path / "metrics.csv").write_text("step,loss\n10,0.5\n20,0.4\n3")
    assert steps_done(tmp_path, 100) == 20


def test_a_folder_without_jobs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "is not the folder of a sweep on Slurm (it has no slurm/)" in capsys.readouterr().err
