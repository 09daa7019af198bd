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
    assert " ETA 0:00" in lines[4] and lines[4].endswith("  nmse 0.25  l0 31.5  dead 3")
    assert lines[9].startswith("topk k=32  100%") and "ETA" not in lines[9]
    assert "\r" not in stream.getvalue()


def test_several_saes_share_a_line_and_have_their_figures_at_the_tenths() -> None:
    for stream in (io.StringIO(), Terminal()):
        follow(Progress("2 SAEs", 1000, stream), 200, names=("sae-topk", "sae-relu"))
        lines = [line.split("\r\033[K")[-1] for line in stream.getvalue().split("\n")[:-1]]
        assert len(lines) == 30
        assert lines[12].startswith("2 SAEs   50%  100,000/200,000 tokens  ") and "nmse" not in lines[12]
        assert lines[13:15] == [f"  {name}  nmse 0.25  l0 31.5  dead 3" for name in ("sae-topk", "sae-relu")]


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
