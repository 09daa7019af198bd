"""python -m pytest tests/data/base/test_progress.py: how far work is, where somebody watches and where nobody does."""

from __future__ import annotations

import io

import pytest

from data.base.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(steps: list[int], total: int | None, **settings: int) -> list[str]:
    """The lines that work in these steps writes to a file."""
    stream = io.StringIO()
    with progress("harvest", total, "tokens", stream=stream, **settings) as bar:
        for step in steps:
            bar.update(step)
    assert "\r" not in stream.getvalue() and "\033" not in stream.getvalue()
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(("most", "written"), [(10, 10), (5, 5), (30, 30)])
def test_plain_lines_where_nobody_watches(most: int, written: int) -> None:
    lines = lines_of([3] * 1000, 3000, lines=most)
    assert len(lines) == written
    assert lines[0].startswith(f"harvest  {100 // most:3}%") and " ETA 0:00" in lines[0]
    assert lines[-1].startswith("harvest  100%  3,000/3,000 tokens  ") and "ETA" not in lines[-1]


def test_large_steps_have_a_line_each() -> None:
    assert [line[9:12] for line in lines_of([25, 25, 25, 25], 100)] == [" 25", " 50", " 75", "100"]


def test_work_that_another_process_did_is_taken_back_and_shown_once() -> None:
    lines = lines_of([50, -50, 50, 50], 100)
    assert [line[9:12] for line in lines] == [" 50", "100"]


def test_work_without_a_known_end_or_below_its_delay_writes_nothing_at_first() -> None:
    assert lines_of([1] * 100, None) == []
    assert lines_of([1] * 100, 100, delay=60) == []


def test_a_terminal_has_a_bar_and_other_processes_have_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    with progress("harvest", 100, "tokens", stream=terminal) as bar:
        bar.update(100)
    assert "\r" in terminal.getvalue() and "100/100" in terminal.getvalue()
    monkeypatch.setenv("RANK", "1")
    assert lines_of([50, 50], 100) == []
