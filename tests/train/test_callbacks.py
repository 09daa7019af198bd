"""Progress lines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from data.base.clock import clock
from train.callbacks import Progress
from train.lit import MultiSAEModule


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LOGGED = {"loss": 1.0, "nmse": 0.25, "l0": 31.5, "dead": 3.0, "lr": 1e-3}


def follow(progress: Progress, steps: int, start: int = 0, names: Sequence[str] = ("topk",)) -> None:
    """Drive the callback through a run of `steps` steps."""
    module: Any = MagicMock(MultiSAEModule)
    members = [SimpleNamespace(figures_logged=LOGGED, name=name) for name in names]
    module.configure_mock(step=start, total=steps, members=members, in_step=members)
    trainer: Any = SimpleNamespace(is_global_zero=True)
    progress.on_train_start(trainer, module)
    for step in range(start + 1, steps + 1):
        module.step = step
        progress.on_train_batch_end(trainer, module)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_ten_lines_where_nobody_watches() -> None:
    stream = io.StringIO()
    follow(Progress("topk k=32", 1000, stream), 200)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[4].startswith("topk k=32   50%  100,000/200,000 tokens  ")
    assert " ETA 0:00" in lines[4] and lines[4].endswith("  loss 1  nmse 0.25  l0 31.5  dead 3  lr 0.001")
    assert lines[9].startswith("topk k=32  100%") and "ETA" not in lines[9]
    assert "\r" not in stream.getvalue()


@pytest.mark.parametrize("saes", [2, 6, 40])
def test_several_saes_have_a_table_and_at_most_30_lines_where_nobody_watches(saes: int) -> None:
    stream = io.StringIO()
    names = [f"sae-{number}" for number in range(saes)]
    follow(Progress(f"{saes} SAEs", 1000, stream), 200, names=names)
    lines = stream.getvalue().splitlines()
    assert len(lines) <= 30 and "\r" not in stream.getvalue() and "\033" not in stream.getvalue()
    last = max(i for i, line in enumerate(lines) if line.startswith(f"{saes} SAEs"))
    assert lines[last].startswith(f"{saes} SAEs  100%  200,000/200,000 tokens") and "nmse" not in lines[last]
    assert lines[last + 1].split() == ["SAE", "loss", "nmse", "l0", "dead", "lr"]
    assert lines[last + 2].split() == ["sae-0", "1", "0.25", "31.5", "3", "0.001"]
    assert lines[-1].split()[0] == names[-1] if saes < 28 else lines[-1].startswith("  and ")


def test_a_terminal_has_one_table_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    progress = Progress("2 SAEs", 1000, stream)
    follow(progress, 50, names=("sae-topk", "sae-relu"))
    progress.shown_at = 0.0  # the next step is due again
    follow(progress, 50, start=49, names=("sae-topk", "sae-relu"))
    first, second = stream.getvalue().split("\033[4A")  # the second drawing goes up to where the first began
    for drawn in (first, second):
        rows = [line.removeprefix("\r\033[K") for line in drawn.split("\n")[:-1]]
        assert len(rows) == 4 and max(map(len, rows)) < 60
        assert [row.split()[0] for row in rows] == ["2", "SAE", "sae-topk", "sae-relu"]


def test_a_continued_run_counts_from_where_it_was() -> None:
    stream = io.StringIO()
    follow(Progress("topk", 1, stream), 100, start=55)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["60%", "70%", "80%", "90%", "100%"]


def test_a_terminal_s_line_is_rewritten_and_ends_once() -> None:
    stream = Terminal()
    follow(Progress("topk", 1, stream), 50)
    assert stream.getvalue().startswith("\r") and stream.getvalue().count("\n") == 1


def test_rate_and_time_left_by_hand() -> None:
    progress = Progress("topk", 10, io.StringIO())
    progress.began_step = 20
    assert progress.line(60, 100, 8.0, {}) == "topk   60%  600/1,000 tokens  50 tokens/s  ETA 0:08"
