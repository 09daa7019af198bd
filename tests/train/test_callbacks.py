"""Progress lines."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from train.callbacks import Progress, clock
from train.lit import LitSAE


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(progress: Progress, steps: int, start: int = 0) -> None:
    """Drive the callback through a run of `steps` steps."""
    module: Any = LitSAE.__new__(LitSAE)
    object.__setattr__(module, "figures_logged", {"loss": 1.0, "nmse": 0.25, "l0": 31.5, "dead": 3.0, "lr": 1e-3})
    trainer: Any = SimpleNamespace(global_step=start, max_steps=steps, is_global_zero=True)
    progress.on_train_start(trainer, module)
    for step in range(start + 1, steps + 1):
        trainer.global_step = step
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
    assert " ETA 0:00" in lines[4] and lines[4].endswith("  nmse 0.25  l0 31.5  dead 3")
    assert lines[9].startswith("topk k=32  100%") and "ETA" not in lines[9]
    assert "\r" not in stream.getvalue()


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
