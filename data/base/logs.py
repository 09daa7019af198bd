"""What a stage prints, kept in a log file too; and lines that say what is being done before the first bar."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

CLEAR = "\033[K"  # with which a terminal clears the rest of a line


def doing(text: str) -> None:
    """Say on stderr what begins, so that no wait is silent: once of however many processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{text} ...", file=sys.stderr, flush=True)


class Tee:
    """A stream that also writes its whole lines, with the time, into log files.

    Of a line that is rewritten in place, as a bar is, the files get what it was in the end, and of what is drawn with a
    terminal's commands (the table of a pass, train/callbacks.py) nothing. All else is the stream's.
    """

    def __init__(self, stream: TextIO, files: Sequence[TextIO]) -> None:
        self.stream, self.files = stream, files
        self.line = ""

    def write(self, text: str) -> int:
        """Write to the stream, and to the files as far as the last whole line."""
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self._log(line)
        # What a bar has drawn over is not needed, and would grow until the bar ends.
        self.line = self.line.rpartition("\r")[2] if not self.line.endswith("\r") else self.line
        return self.stream.write(text)

    def _log(self, line: str) -> None:
        shown = line.rstrip("\r").rpartition("\r")[2]
        for file in self.files if shown.strip() and CLEAR not in shown else ():
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shown}\n")
            file.flush()

    def end(self) -> None:
        """Write what is left of a line to the files."""
        self._log(self.line)
        self.line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def logged(paths: Sequence[Path]) -> Iterator[None]:
    """Write what is printed meanwhile into files too, at their ends; a file that cannot be opened is left out."""
    files: list[TextIO] = []
    for path in paths:
        try:
            files.append(path.open("a", encoding="utf-8", errors="backslashreplace"))
        except OSError as error:
            print(f"{path} cannot be written ({error.strerror}), so nothing is logged there", file=sys.stderr)
    out, err = sys.stdout, sys.stderr
    tees = Tee(out, files), Tee(err, files)
    sys.stdout, sys.stderr = tees
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for tee in tees:
            tee.end()
        for file in files:
            file.close()
