"""The neighbour's benchmark: neighbours run when they should, and what it makes of its times."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.contestants.process import ROOT
from benchmarks.neighbour import main, measure, neighbours, table

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processor time is read from /proc")


def processor_time(pid: int) -> int:
    """Clock ticks that a process has computed for."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


@linux
def test_so_many_neighbours_compute_and_none_is_left() -> None:
    with neighbours(2) as busy:
        pids = [process.pid for process in busy.processes]
        busy.run(1)
        before = [processor_time(pid) for pid in pids]
        deadline = time.monotonic() + 30
        while processor_time(pids[0]) < before[0] + 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processor_time(pids[0]) >= before[0] + 5
        assert processor_time(pids[1]) <= before[1] + 1
    assert all(process.returncode is not None for process in busy.processes)


def test_every_part_is_measured_beside_each_number_in_every_round() -> None:
    calls = []
    measured = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, [0, 1], rounds=3)
    assert calls == ["a", "b"] * 7  # one to warm up, then two numbers a round
    assert {name: {count: len(seconds) for count, seconds in by.items()} for name, by in measured.items()} == {
        "a": {0: 3, 1: 3},
        "b": {0: 3, 1: 3},
    }


def test_ratios_are_of_one_round_and_the_goal_is_of_the_worst() -> None:
    """Rounds of 1 and 2 seconds alone: beside one neighbour 1.5 and 3 seconds are 1.5 times in both."""
    lines = table({"part": {0: [1.0, 2.0], 1: [1.5, 3.0], 2: [3.0, 6.0]}}).splitlines()
    assert lines[-1] == "| part | 1500 | 1.50 (1.50 to 1.50) | 3.00 (3.00 to 3.00) | missed |"
    assert table({"part": {0: [1.0], 1: [2.5]}}).endswith("| 2.50 (2.50 to 2.50) | met |")


@pytest.mark.slow
def test_it_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--d-model", "16", "--width", "96", "--k", "4", "--batch", "32", "--steps", "1"]
    main(["--rounds", "1", *sizes, "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "OMP_WAIT_POLICY=" in printed and "load of the machine before" in printed
    assert sum(line.startswith("| 1 steps, ") for line in printed.splitlines()) == 6
    assert "| harvest |" in printed and "| evaluation |" in printed


@pytest.mark.parametrize(("given", "policy"), [(None, "passive"), ("active", "active")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(given: str | None, policy: str) -> None:
    """Set before torch is imported: it is OpenMP's to read, once."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    code = "import sys, data, os; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == policy, done.stderr
