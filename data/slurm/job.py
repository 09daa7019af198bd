"""What runs in a job: the work itself, stopped in time to be saved, and a record of how it ended."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from submitit.helpers import Checkpointable

from data.base import cli
from data.base.errors import to_sentence
from data.base.files import write_atomic

Work = Callable[[], None]


def is_first() -> bool:
    """Return whether this is the first of its job's processes."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


class Job(Checkpointable):
    """Does `work` and writes `{"error": null}`, or what went wrong in a sentence, into `outcome`.

    Nothing is written where a signal ends it: Slurm then queues it again, or somebody cancelled it. `work` saves what
    it needs to go on when it is started again, which is all that a job that is queued again does.
    """

    def __init__(self, work: Work, outcome: Path) -> None:
        self.work, self.outcome = work, outcome

    def __call__(self) -> None:
        cli.keep_freed_memory()
        # Slurm warns by USR2 before the time limit, and by TERM before it takes a job's place or cancels it. submitit's
        # handler for USR2 ends the process where it stands; the work is first given the time to save.
        requeue = signal.getsignal(signal.SIGUSR2)
        warned: list[int] = []

        def warn(number: int, frame: FrameType | None) -> None:
            warned.append(number)
            os.kill(os.getpid(), signal.SIGTERM)

        def stop(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGUSR2, warn)
        signal.signal(signal.SIGTERM, stop)
        try:
            self.work()
        except (KeyboardInterrupt, SystemExit):
            if warned and callable(requeue):
                requeue(warned[0], None)
            # Not 0: the work is not done. But while the first process has the job queued again, one that ends with an
            # error would end it too.
            raise SystemExit(128 + signal.SIGTERM if is_first() else 0) from None
        except Exception as error:
            sentence = to_sentence(error)
            self._record(sentence or f"{type(error).__name__}: {error}")
            if sentence is None:
                raise
            print(f"error: {sentence}", file=sys.stderr)
            raise SystemExit(1) from None
        self._record(None)

    def _record(self, error: str | None) -> None:
        if is_first():
            write_atomic(self.outcome, json.dumps({"error": error}) + "\n")
