"""How a job ends, and what it leaves for whoever looks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.base.errors import UserError
from data.slurm.job import Job


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The handlers of the tests' own process, put back after a job had its own."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.fixture
def outcome(tmp_path: Path) -> Path:
    return tmp_path / "0.json"


def raising(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_work_that_ends_is_recorded(outcome: Path) -> None:
    done: list[int] = []
    Job(lambda: done.append(1), outcome)()
    assert done == [1] and json.loads(outcome.read_text()) == {"error": None}


def test_a_mistake_is_recorded_as_its_sentence(outcome: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Job(raising(UserError("no store: make one")), outcome)()
    assert ended.value.code == 1 and json.loads(outcome.read_text()) == {"error": "no store: make one"}
    assert "error: no store: make one" in capsys.readouterr().err


def test_a_fault_of_the_program_leaves_its_traceback_in_the_log(outcome: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Job(raising(ZeroDivisionError("by 0")), outcome)()
    assert json.loads(outcome.read_text()) == {"error": "ZeroDivisionError: by 0"}


def test_a_job_that_is_stopped_leaves_no_outcome_as_it_is_queued_again(outcome: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        Job(lambda: os.kill(os.getpid(), signal.SIGTERM), outcome)()
    assert ended.value.code == 143 and not outcome.exists()


def test_near_its_time_limit_the_work_saves_before_the_job_is_queued_again(outcome: Path) -> None:
    order: list[str] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: order.append(f"requeued by {number}"))

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
        except KeyboardInterrupt:
            order.append("saved")
            raise SystemExit(143) from None  # as a training ends

    with pytest.raises(SystemExit):
        Job(work, outcome)()
    assert order == ["saved", f"requeued by {int(signal.SIGUSR2)}"] and not outcome.exists()


def test_of_several_processes_the_first_one_speaks(outcome: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    Job(print, outcome)()
    assert not outcome.exists()
    with pytest.raises(SystemExit) as ended:
        Job(lambda: os.kill(os.getpid(), signal.SIGTERM), outcome)()
    assert ended.value.code == 0  # an error would end the first before it has had the job queued again
