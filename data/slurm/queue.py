"""What Slurm's own commands say: which jobs there are and how they stand, and where they run."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.base.errors import UserError

# Slurm's states of a job that will run, of one that runs, and of one that is about to leave its node.
QUEUED = frozenset(["PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"])
RUNNING = frozenset(["RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"])
LEAVING = frozenset(["COMPLETING", "STAGE_OUT", "PREEMPTED"])
_SECONDS = 60  # after which a command of Slurm is given up
# A file system in memory or in a container is seen by no other host; of others it cannot be told.
_OF_THIS_HOST = ("tmpfs", "ramfs", "overlay")


@dataclass(frozen=True)
class QueuedJob:
    """A job as the queue has it; a finished one is listed for some minutes."""

    id: str
    state: str
    reason: str
    submission: int
    index: int

    @property
    def queued(self) -> bool:
        """Return whether it waits."""
        return self.state in QUEUED

    @property
    def alive(self) -> bool:
        """Return whether it waits or runs."""
        return self.queued or self.state in RUNNING | LEAVING


class SlurmSilent(UserError):
    """A command of Slurm failed or did not answer."""


def run_slurm(*command: str) -> str:
    """Run one of Slurm's commands and return what it prints; SlurmSilent with its own words where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on this machine: start this on a login node of the cluster, or leave out "
            "hydra/launcher=slurm"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"Slurm does not answer {command[0]} within {_SECONDS} s: try again later") from None
    if done.returncode:
        raise SlurmSilent(f"Slurm refused {command[0]} ({own_words(done.stderr)}): try again later")
    return done.stdout


def own_words(text: str) -> str:
    """Take the message from what one of Slurm's commands writes on an error."""
    lines = [line.partition("error: ")[2] or line for line in text.splitlines() if "error: " in line]
    return "; ".join(dict.fromkeys(line.strip().rstrip(".") for line in lines)) or text.strip() or "no reason given"


def check_slurm() -> None:
    """Refuse to go on where jobs cannot be submitted from."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError('hydra/launcher=slurm needs submitit: .venv/bin/pip install -e ".[slurm]"')
    for command in ("sbatch", "srun", "squeue"):
        if shutil.which(command) is None:
            raise UserError(
                f"there is no {command} on this machine: start this on a login node of the cluster, or leave out "
                "hydra/launcher=slurm"
            )


def jobs_named(name: str) -> list[QueuedJob]:
    """List the jobs of a name, those that ended in the last minutes too; SlurmSilent where Slurm does not answer."""
    fields = "--format=%i|%T|%r|%k"
    lines = run_slurm("squeue", "--noheader", "--array", "--states=all", f"--name={name}", fields).splitlines()
    jobs = []
    for line in lines:
        job, state, reason, comment = line.split("|", 3)
        index = job.partition("_")[2]
        # Every job of ours has the number of its submission as its comment.
        if comment.strip().isdecimal() and (index or "0").isdecimal():
            jobs.append(QueuedJob(job, state, reason, int(comment), int(index or 0)))
    return jobs


def cancel(jobs: list[QueuedJob]) -> None:
    """Cancel jobs."""
    if jobs:
        run_slurm("scancel", *(job.id for job in jobs))


def check_shared(folder: Path) -> None:
    """Refuse a folder that the cluster's nodes cannot see, as far as this can be told from here."""
    here = socket.gethostname().split(".")[0]
    nodes = {node.split(".")[0] for node in run_slurm("sinfo", "--noheader", "--Node", "--format=%n").split()}
    if nodes <= {here}:
        return
    kind = _file_system(folder)
    temporary = folder.resolve().is_relative_to(Path(tempfile.gettempdir()).resolve())
    if kind in _OF_THIS_HOST or temporary:
        what = "below the folder for temporary files" if temporary else f"on {kind}"
        raise UserError(
            f"{folder} is {what}, which the cluster's nodes do not share with {here}: choose a folder on a shared file "
            "system"
        )


def _file_system(folder: Path) -> str:
    """Return the type of the file system a folder lies on; nothing where the system does not say."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    place = folder.resolve()
    best, kind = Path("/"), ""
    for line in mounts.read_text().splitlines():
        point, name = line.split(" ")[1:3]
        at = Path(point.encode().decode("unicode_escape"))
        if place.is_relative_to(at) and len(at.parts) >= len(best.parts):
            best, kind = at, name
    return kind
