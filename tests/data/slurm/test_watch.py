"""Jobs are submitted, looked after and started again; what happens to them is played by the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data.base.errors import UserError
from data.slurm.records import JobFolder
from data.slurm.settings import SlurmSettings
from data.slurm.watch import Keeper, Standing, raise_failed
from tests.helpers.fake_slurm import FakeSlurm

Step = Callable[[], None]


class Letters:
    """A work of items `a`, `b`, ...: one is done when its file is there."""

    noun, unit, look, again = "letters", "strokes", "python look.py", "the same command"
    processes = nodes = 1

    def __init__(self, folder: Path, items: str) -> None:
        self.folder = folder
        self.sizes = dict.fromkeys(items, 10)
        self.total = 10 * len(items)
        self.early = False

    def is_done(self, item: str) -> bool:
        return (self.folder / item).exists()

    def finish(self, items: str) -> None:
        for item in items:
            (self.folder / item).touch()

    def progress(self) -> int:
        return sum(10 * self.is_done(item) for item in self.sizes)

    def complete(self) -> bool:
        return self.early

    def cut(self, items: Sequence[str]) -> list[list[str]]:
        return [list(items[i : i + 2]) for i in range(0, len(items), 2)]

    def job(self, items: Sequence[str]) -> Step:
        return print


@pytest.fixture
def work(tmp_path: Path) -> Letters:
    (tmp_path / "letters").mkdir()
    return Letters(tmp_path / "letters", "abc")


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "jobs")


def play(work: Letters, folder: JobFolder, *steps: Step, restarts: int = 1) -> dict[str, Standing]:
    """Look after the work; between two looks the next step happens."""
    happening = iter(steps)
    asked = SlurmSettings.of({"restarts": restarts, "partition": "p"})
    return Keeper(work, folder, asked, lambda seconds: next(happening)()).run()


def ended(folder: JobFolder, submission: int, index: int, error: str = "null") -> Step:
    return lambda: (folder.outcome_path(submission, index).write_text(f'{{"error": {error}}}'), None)[1]


def states(found: dict[str, Standing]) -> str:
    return " ".join(one.state for one in found.values())


def nothing() -> None:
    """Let time pass."""


def test_a_job_for_each_share_and_a_line_over_all(
    slurm: FakeSlurm, work: Letters, folder: JobFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    found = play(
        work,
        folder,
        lambda: slurm.become("1_0", "RUNNING"),
        lambda: work.finish("ab"),
        lambda: slurm.become("1_1", "RUNNING"),
        ended(folder, 1, 1),
    )
    assert states(found) == "done done done"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "0/3 letters done, 0 running, 3 queued (Priority), 0 failed  0/30 strokes"
    assert lines[1].startswith("0/3 letters done, 2 running, 1 queued, 0 failed")
    assert lines[2].startswith("2/3 letters done, 0 running, 1 queued (Priority), 0 failed  20/30 strokes  ETA ")
    script = slurm.script(1)
    assert f"--job-name={folder.name}\n" in script and "--partition=p\n" in script and "#SBATCH --requeue\n" in script


def test_the_same_command_attaches_to_what_runs_and_submits_what_is_missing(
    slurm: FakeSlurm, work: Letters, folder: JobFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        play(work, folder, interrupt)
    assert stopped.value.code == 130
    said = capsys.readouterr().out
    assert "the jobs go on; look again with python look.py, look after them with the same command" in said
    assert f"cancel them with scancel --name={folder.name}" in said
    slurm.become("1_0", "RUNNING")
    slurm.become("1_1", None)
    found = play(work, folder, lambda: work.finish("ab"), lambda: work.finish("c"))
    assert states(found) == "done done done"
    assert list(slurm.jobs()) == ["1_0", "2"]
    assert [list(ticket.items) for ticket in folder.tickets()] == [["a", "b"], ["c"], ["c"]]
    assert "1 jobs of this command are there already, with 2 letters" in capsys.readouterr().out


def test_what_is_done_is_not_submitted(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    work.finish("abc")
    assert states(play(work, folder)) == "done done done"
    assert slurm.jobs() == {}


def test_a_job_that_died_is_started_again_with_what_it_had_not_done(
    slurm: FakeSlurm, work: Letters, folder: JobFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    def die() -> None:
        work.finish("a")
        slurm.become("1_0", "FAILED")
        (folder.path / "1" / "1_0_0_log.out").write_text("Killed")

    found = play(work, folder, die, nothing, nothing, lambda: work.finish("bc"))
    assert states(found) == "done done done"
    assert [list(ticket.items) for ticket in folder.tickets()] == [["a", "b"], ["c"], ["b"]]
    log = folder.path / "1" / "1_0_0_log.out"
    assert f"b: its job ended as FAILED, see {log}; it is started again" in capsys.readouterr().err


def test_what_dies_again_and_again_has_failed(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    work.finish("c")
    found = play(
        work,
        folder,
        lambda: slurm.become("1", "NODE_FAIL"),
        *[nothing] * 2,
        lambda: slurm.become("2", None),
        *[nothing] * 2,
    )
    assert states(found) == "failed failed done"
    with pytest.raises(UserError, match=r"^2 of 3 letters failed: its job is no longer in the queue and wrote nothing"):
        raise_failed("letters", found)
    assert found["a"].why.endswith(", after 1 restarts")


def test_a_cancelled_job_is_not_started_again(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    found = play(work, folder, lambda: slurm.become("1_0", "CANCELLED"), lambda: work.finish("c"))
    assert states(found) == "cancelled cancelled done"
    assert set(slurm.jobs()) == {"1_0", "1_1"}
    again = play(work, folder, lambda: work.finish("ab"))
    assert states(again) == "done done done" and "2" in slurm.jobs()


def test_an_error_of_a_job_is_passed_on(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    found = play(work, folder, ended(folder, 1, 0, '"ink is out: buy some"'), lambda: work.finish("c"))
    with pytest.raises(UserError, match=r"^2 of 3 letters failed: ink is out: buy some$"):
        raise_failed("letters", found)


def test_a_controller_that_does_not_answer_is_waited_for(
    slurm: FakeSlurm, work: Letters, folder: JobFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    found = play(
        work, folder, lambda: slurm.silent(True), lambda: slurm.silent(False), lambda: work.finish("abc"), restarts=0
    )
    assert states(found) == "done done done"
    assert "Slurm refused squeue (Unable to contact slurm controller)" in capsys.readouterr().err


def test_nothing_is_submitted_blindly(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    slurm.silent(True)
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        play(work, folder)
    assert slurm.jobs() == {} and folder.tickets() == []


def test_jobs_that_wait_are_cancelled_when_nothing_is_left(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    def complete() -> None:
        slurm.become("1_0", "RUNNING")
        work.early = True

    play(work, folder, complete)
    assert slurm.cancelled() == ["1_1"]


def test_two_commands_do_not_submit_the_same(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    def other() -> None:
        with pytest.raises(UserError, match=r"another command looks after the jobs of .*: python look\.py"):
            play(work, folder)
        work.finish("abc")

    play(work, folder, other)
    assert set(slurm.jobs()) == {"1_0", "1_1"}


def test_sbatch_s_own_words_are_passed_on(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    slurm.refuse("sbatch: error: invalid partition specified: p\n")
    with pytest.raises(UserError, match=r"sbatch refused the jobs \(invalid partition specified: p\): change hydra"):
        play(work, folder)
    assert folder.tickets() == []


def test_what_is_missing_is_named(
    slurm: FakeSlurm, work: Letters, folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        with pytest.raises(UserError, match=r'needs submitit: .venv/bin/pip install -e "\.\[slurm\]"'):
            play(work, folder)
    (slurm.folder / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(slurm.folder))
    with pytest.raises(UserError, match="there is no sbatch on this machine: start this on a login node"):
        play(work, folder)


def test_a_folder_that_nodes_cannot_see_is_refused(slurm: FakeSlurm, work: Letters, folder: JobFolder) -> None:
    slurm.nodes("node1", "node2")
    with pytest.raises(UserError, match=r"which the cluster's nodes do not share with .*: choose a folder on a shared"):
        play(work, folder)
