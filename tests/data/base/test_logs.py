"""Log files hold what was printed; bars and tables that are redrawn do not fill them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data.base.logs import doing, logged


def lines_of(path: Path) -> list[str]:
    """The lines of a log without their times."""
    return [line.split("  ", 1)[1] for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_printed_stands_in_every_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.log", tmp_path / "b.log"]
    paths[0].write_text("2000-01-01 00:00:00  before\n")
    with logged(paths):
        print("one")
        print("two", "and", "more", file=sys.stderr)
        print("no end", end="")
    assert lines_of(paths[0]) == ["before", "one", "two and more", "no end"]
    assert lines_of(paths[1]) == ["one", "two and more", "no end"]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("one\nno end", "two and more\n")
    print("after")
    assert "after" not in paths[0].read_text()


def test_a_bar_is_logged_as_it_ended_and_a_drawn_table_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with logged([path]):
        for part in range(0, 101, 20):
            sys.stderr.write(f"\rharvest {part}%")
        sys.stderr.write("\n")
        sys.stderr.write("\033[2A\r\033[Kone\n\r\033[Ktwo\n")
        sys.stderr.write("done\n")
    assert lines_of(path) == ["harvest 100%", "done"]


def test_an_error_is_logged_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    with pytest.raises(RuntimeError), logged([path]):
        print("before the error")
        raise RuntimeError
    assert lines_of(path) == ["before the error"]


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged([tmp_path / "missing" / "a.log"]):
        print("goes on")
    said = capsys.readouterr()
    assert said.out == "goes on\n" and "so nothing is logged there" in said.err


def test_one_of_many_processes_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doing("loading the model")
    monkeypatch.setenv("RANK", "1")
    doing("loading the model")
    assert capsys.readouterr().err == "loading the model ...\n"
