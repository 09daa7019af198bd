"""Ctrl-C and SIGTERM (Slurm's warning before a job's time is up): while steps are taken, save first and then stop."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

_WATCHED = (signal.SIGINT, signal.SIGTERM)
_AGAIN_AFTER = 1.0  # seconds: a launcher of several ranks passes the same Ctrl-C on a second time


class Signals:
    """Remembers a signal while `deferring`, so that a step can end and a checkpoint be written; else stops at once.

    A second Ctrl-C stops at once too. Handlers are in place inside the `with` block, and in the main thread only, the
    one that Python lets set them.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferring = False
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.getsignal(one) for one in _WATCHED}
            self.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def install(self) -> None:
        """Put the handlers in place again: Lightning sets its own for SIGTERM when a fit begins."""
        if threading.current_thread() is threading.main_thread():
            for one in _WATCHED:
                signal.signal(one, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received = signal.Signals(number)
            self._received_at = now
            if self.deferring:
                print("stopping after this step, to save it (Ctrl-C again: at once)", file=sys.stderr)
                return
        elif self.deferring and (number != signal.SIGINT or now - self._received_at < _AGAIN_AFTER):
            return
        raise KeyboardInterrupt
