"""How far a long piece of work is: a bar on a terminal, a few plain lines where the output goes to a file or a pipe."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from data.base.clock import clock

LINES = 10  # of one piece of work, where nobody watches
FIRST_AFTER_S = 10.0  # before the first line of work whose end is not known, and between the first two


class Parts:
    """The equal parts of a piece of work, each of which is reported once where nobody watches."""

    def __init__(self, count: int, done: int = 0, total: int = 1) -> None:
        self.count = count
        self.shown = self._part(done, total)

    def due(self, done: int, total: int) -> bool:
        """Return whether a part ended since the last that was reported."""
        part = self._part(done, total)
        if part <= self.shown:
            return False
        self.shown = part
        return True

    def _part(self, done: int, total: int) -> int:
        return self.count * done // max(1, total)


def progress_line(label: str, done: int, total: int | None, rate: float, unit: str) -> str:
    """Write how far it is, in `unit`, at a rate a second, and the time left."""
    speed = f"{rate:,.0f} {unit}/s"
    if total is None:
        return f"{label}  {done:,} {unit}  {speed}"
    left = "" if done >= total else f"  ETA {clock((total - done) / max(rate, 1e-9))}"
    return f"{label}  {done / max(1, total):4.0%}  {done:,}/{total:,} {unit}  {speed}{left}"


class PlainLines:
    """Lines in the place of a tqdm bar, with as much of its interface as the stages use.

    total: None where the end is not known; lines then come at intervals that double. delay: seconds in which nothing is
    written.
    """

    def __init__(
        self, label: str, total: int | None, unit: str, stream: TextIO, *, lines: int = LINES, delay: float = 0.0
    ) -> None:
        self.label, self.total, self.unit, self.stream, self.delay = label, total, unit, stream, delay
        self.n = 0
        self.note = ""
        self._parts = Parts(lines)
        self._began = time.monotonic()
        self._wait = FIRST_AFTER_S

    def update(self, n: int = 1) -> None:
        """Count what was done; fewer than none takes back what another process has done instead."""
        self.n += n
        took = time.monotonic() - self._began
        if self.total is None:
            due = took > self._wait
            self._wait *= 2 if due else 1
        else:
            due = took >= self.delay and self._parts.due(self.n, self.total)
        if due:
            line = progress_line(self.label, self.n, self.total, self.n / max(took, 1e-9), self.unit)
            self.stream.write(f"{line}{self.note}\n")
            self.stream.flush()

    def set_postfix_str(self, note: str, refresh: bool = True) -> None:
        """Note what the next line ends with."""
        self.note = f"  {note}"

    def refresh(self) -> None:
        """Do nothing: a line is written once."""

    def close(self) -> None:
        """Do nothing: a line stays as it is."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def progress(
    label: str,
    total: int | None,
    unit: str,
    *,
    quiet: bool = False,
    lines: int = LINES,
    delay: float = 0.0,
    leave: bool = True,
    stream: TextIO | None = None,
) -> Any:
    """Return a tqdm bar on a terminal, elsewhere lines that are written as plain ones; of several processes that
    torchrun started, the first one's alone.

    lines: the most, in equal parts of the work. delay: seconds before anything is shown. leave: whether the bar stays.
    stream: stderr where it is None.
    """
    from tqdm import tqdm

    stream = stream or sys.stderr
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    if not (quiet or stream.isatty()):
        return PlainLines(label, total, unit, stream, lines=lines, delay=delay)
    options = {"unit_scale": True, "mininterval": 1.0, "delay": delay, "leave": leave, "disable": quiet}
    return tqdm(total=total, desc=label, unit=f" {unit}", file=stream, **options)
