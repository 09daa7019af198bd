"""What lies in a folder of jobs: for each submission the items of its jobs, how each job ended, and the logs.

    <folder>/<n>/jobs.json     {"items": [{item: its size, ...}, ...]}, an entry a job, written before it is submitted
    <folder>/<n>/<i>.json      how job i ended; none while it runs, or where it died
    <folder>/<n>/*_log.out     what the jobs printed; the other files are submitit's

The jobs of all submissions have one name, and the submission's number as comment: the queue alone says which they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.base.errors import UserError
from data.base.files import write_atomic
from data.slurm.queue import own_words
from data.slurm.settings import LAUNCHER, SlurmSettings

CHECKOUT = Path(__file__).resolve().parents[2]
_JOBS = "jobs.json"
_TIME_LIMITS = 10_000  # a job is queued again as often as its time runs out: it has saved some steps more each time


@dataclass(frozen=True)
class Ticket:
    """A job that was submitted: its submission, its place there, and its items with their sizes."""

    submission: int
    index: int
    items: Mapping[str, int]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with an error in a sentence, or without one."""

    error: str | None


class JobFolder:
    """The jobs of one sweep or one harvest; read by whoever looks, added to by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """Return the name of all its jobs."""
        return f"thresher-{hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:8]}"

    def tickets(self) -> list[Ticket]:
        """Return all jobs ever submitted, in order."""
        tickets = []
        for submission in self._submissions():
            content = json.loads((self.path / str(submission) / _JOBS).read_text(encoding="utf-8"))
            tickets += [Ticket(submission, index, items) for index, items in enumerate(content["items"])]
        return tickets

    def _submissions(self) -> list[int]:
        names = [path.parent.name for path in self.path.glob(f"*/{_JOBS}")]
        return sorted(int(name) for name in names if name.isdecimal())

    def outcome_path(self, submission: int, index: int) -> Path:
        """Return where a job says how it ended."""
        return self.path / str(submission) / f"{index}.json"

    def outcome(self, ticket: Ticket) -> Outcome | None:
        """Read how a job ended; None while it runs, or where it died."""
        try:
            content = json.loads(self.outcome_path(ticket.submission, ticket.index).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return Outcome(content["error"])

    def log(self, ticket: Ticket) -> Path | None:
        """Find what a job printed; None where it wrote nothing here."""
        # <job>_0_log.out of a job alone, <job>_<i>_0_log.out of one of several.
        own = re.compile(rf"\d+(_{ticket.index})?_0_log\.out")
        logs = [path for path in (self.path / str(ticket.submission)).glob("*_log.out") if own.fullmatch(path.name)]
        return logs[0] if logs else None

    def next_submission(self) -> int:
        """Return the number of the submission that is made next."""
        numbers = [int(path.name) for path in self.path.glob("*/") if path.name.isdecimal()]
        return max([0, *numbers]) + 1

    @contextlib.contextmanager
    def only_keeper(self, look: str) -> Iterator[None]:
        """Be the one process that submits these jobs; UserError where another is, with the command to `look`."""
        import fcntl

        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another command looks after the jobs of {self.path}: {look}") from None
            except OSError:
                print(f"{self.path} lies where files cannot be locked: start no other such command", file=sys.stderr)
            yield
        finally:
            os.close(descriptor)


def submit(
    folder: JobFolder,
    items: Sequence[Mapping[str, int]],
    works: Sequence[Callable[[], None]],
    settings: SlurmSettings,
    processes: int = 1,
    nodes: int = 1,
) -> int:
    """Submit a job for each of `works`, which does the `items` beside it; return the submission's number.

    All `processes` on each of a job's `nodes` do its work together.
    UserError with sbatch's own words where it refuses them.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    from data.slurm.job import Job

    number = folder.next_submission()
    place = folder.path / str(number)
    place.mkdir(parents=True)
    # First the record: jobs that are in the queue and have none could not be told from another's.
    write_atomic(place / _JOBS, json.dumps({"items": [dict(each) for each in items]}) + "\n")
    executor = submitit.SlurmExecutor(place, max_num_timeout=_TIME_LIMITS)
    parameters = settings.parameters(folder.name, str(number), len(works), processes, nodes)
    executor.update_parameters(**parameters, setup=_setup())
    try:
        # submitit prints sbatch's words; here they are part of the sentence.
        with contextlib.redirect_stderr(io.StringIO()), executor.batch():
            for index, work in enumerate(works):
                executor.submit(Job(work, folder.outcome_path(number, index)))
    except FailedJobError as error:
        shutil.rmtree(place)
        raise UserError(
            f"sbatch refused the jobs ({own_words(str(error))}): change {LAUNCHER}.partition and its other settings "
            "(conf/hydra/launcher/slurm.yaml)"
        ) from None
    return number


def _setup() -> list[str]:
    """Return the lines of the batch script before the command."""
    return [
        f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}${{PYTHONPATH:+:$PYTHONPATH}}",
        # From Slurm 22.05 on srun no longer takes the job's cores by itself.
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}",
    ]
