"""A Slurm of a test's own: one controller, two nodes and munge on this machine, in a folder and on ports of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NEEDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
NODES = ("n1", "n2")
WAIT = 240.0  # seconds for what takes one or two on a quiet machine


def why_not() -> str | None:
    """Say why no Slurm can be started here, or nothing."""
    missing = [name for name in NEEDS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"Slurm is not installed ({missing[0]} is missing): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "only root can start Slurm's daemons"


def _path() -> str:
    return os.environ["PATH"] + os.pathsep + os.pathsep.join(("/usr/sbin", "/sbin"))


def until(holds: Callable[[], bool], what: str, seconds: float = WAIT) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs; `environment` is what its commands need."""

    folder: Path
    environment: dict[str, str]

    def say(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def queue(self) -> dict[str, tuple[str, str]]:
        """Return the state and the node of each job that is queued or runs."""
        lines = self.say("squeue", "--noheader", "--array", "--format=%i|%T|%N").splitlines()
        return {job: (state, node) for job, state, node in (line.split("|") for line in lines)}

    def running(self, count: int = 1) -> list[str]:
        """Wait until so many jobs run, and return their ids."""
        until(lambda: self._running(count) != [], f"{count} running jobs")
        return self._running(count)

    def _running(self, count: int) -> list[str]:
        jobs = [job for job, (state, _) in self.queue().items() if state == "RUNNING"]
        return jobs if len(jobs) >= count else []

    def process_of(self, job: str) -> int:
        """Find the process that does the work of a job of an array."""
        array, _, index = job.partition("_")
        marks = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()}
        marks.add(f"SLURM_CONF={self.environment['SLURM_CONF']}".encode())
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                python = b"python" in words[0] and b"submitit.core._submit" in words
                if python and marks <= set((folder / "environ").read_bytes().split(b"\0")):
                    return int(folder.name)
        raise AssertionError(f"no process does the work of job {job}")

    def kill_node(self, node: str) -> None:
        """Let a node fail: its daemon and what it runs are killed, and the controller is told that it is down."""
        daemon = int((self.folder / f"{node}.pid").read_text())
        for pid in [daemon, *_below(self.folder, node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.say("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def start_node(self, node: str) -> None:
        """Start a node's daemon and wait until jobs can go there."""
        subprocess.run(["slurmd", "-N", node], env=self.environment, check=True, capture_output=True)
        until(lambda: self._idle(node), f"node {node}")

    def _idle(self, node: str) -> bool:
        return self.say("sinfo", "--noheader", f"--nodes={node}", "--format=%T") in ("idle", "mixed", "allocated")


def _below(folder: Path, node: str) -> Iterator[int]:
    """Yield the processes of a node's jobs: what has its name in the environment, and the steps, which have its log."""
    mark = f"SLURMD_NODENAME={node}\0".encode()
    log = str(folder / f"{node}.log")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            files = {os.readlink(link) for link in (process / "fd").iterdir()}
            if log in files or mark in (process / "environ").read_bytes():
                yield int(process.name)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_ones:
        sockets = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _configuration(folder: Path) -> str:
    host = socket.gethostname().split(".")[0]
    controller, *nodes = _free_ports(1 + len(NODES))
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket,cred_expire=5",  # a requeued job waits for so long
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/%n",
        f"SlurmdPidFile={folder}/%n.pid",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdLogFile={folder}/%n.log",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerParameters=sched_interval=2,bf_interval=2",
        "ReturnToService=2",
        "MpiDefault=none",
        "KillWait=5",
    ]
    for node, port in zip(NODES, nodes, strict=True):
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=4000")
    lines.append(f"PartitionName=p Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start a Slurm whose files lie in `folder`, and stop it at the end."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    for name in ("state", *NODES):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder))
    slurm = Slurm(folder, {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        munge = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        _daemon(slurm, "munged", "--force", f"--socket={folder}/munge.socket", *munge.values())
        _daemon(slurm, "slurmctld")
        for node in NODES:
            slurm.start_node(node)
        yield slurm
    finally:
        for name in (*NODES, "slurmctld", "munge"):
            _stop(folder / f"{name}.pid")


def _daemon(slurm: Slurm, *command: str) -> None:
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr


def _stop(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
        pid = int(path.read_text())
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(AssertionError):
            until(lambda: not Path(f"/proc/{pid}").exists(), f"{path.name} to end", seconds=10)
