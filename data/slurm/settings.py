"""The settings of `hydra/launcher=slurm` (conf/hydra/launcher/slurm.yaml): what each job asks of the cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pydantic import AfterValidator, Field

from data.base.composing import SLURM
from data.base.config import Flag, Real, Settings, Text, Whole

LAUNCHER = "hydra.launcher"
# Set by what starts the jobs; another value would separate them from their records.
_OURS = ("job-name", "comment", "array", "output", "error", "open-mode", "signal", "wrap", "chdir")


def _one_line(value: str) -> str:
    """Refuse what would end a comment line of the batch script, as the rest of it would then be run as a command."""
    if not value.strip() or re.search(r"[\x00-\x1f\x7f]", value):
        raise ValueError(f"{LAUNCHER}: {value!r} is no value for sbatch: give one line of text")
    return value


def _parameters(given: dict[str, str | int | float | bool]) -> dict[str, str | int | float | bool]:
    for name, value in given.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise ValueError(f"{LAUNCHER}.sbatch: {name!r} is no parameter: write it as sbatch does, less its dashes")
        if name in _OURS:
            raise ValueError(f"{LAUNCHER}.sbatch.{name} is set by this program: leave it out")
        _one_line(str(value))
    return given


OneLine = Annotated[Text, AfterValidator(_one_line)]


class SlurmSettings(Settings):
    """What the jobs are and what each asks for; null: the cluster's own default."""

    saes_per_job: Whole | None = Field(None, ge=1)
    """Of a sweep: SAEs that one job trains side by side; null: all that can share a pass."""
    workers: Whole | None = Field(None, ge=1)
    """Of a harvest: jobs that share it; null: 1."""
    partition: OneLine | None = None
    """Where the jobs run."""
    account: OneLine | None = None
    """Whose budget they take."""
    qos: OneLine | None = None
    """Quality of service."""
    constraint: OneLine | None = None
    """Features a node must have."""
    hours: Real = Field(24.0, gt=0, le=24 * 365)
    """Time limit of a job; when it is near, the job saves, is queued again and goes on."""
    gpus: Whole = Field(1, ge=0)
    """GPUs of a job on each of its nodes."""
    cpus: Whole = Field(8, ge=1)
    """CPU cores of a job, or of each of its processes (trainer.devices)."""
    memory_gb: Real | None = Field(None, gt=0)
    """Memory of a job on each of its nodes."""
    at_once: Whole | None = Field(None, ge=1)
    """Jobs that run at the same time; null: as many as the cluster allows."""
    sbatch: Annotated[dict[str, Text | Flag | Whole | Real], AfterValidator(_parameters)] = Field(default_factory=dict)
    """Further parameters of sbatch, by its own names without the dashes."""
    restarts: Whole = Field(3, ge=0)
    """Times that work is submitted again after its job died, each time saved work is gone on with."""
    poll_seconds: Real = Field(10.0, gt=0, le=3600)
    """Between two looks at the queue."""

    @classmethod
    def of_launcher(cls, launcher: Mapping[str, Any]) -> SlurmSettings:
        """Read Hydra's group `launcher`; UserError names what is wrong."""
        given = OmegaConf.to_container(OmegaConf.create(dict(launcher)), resolve=True)
        assert isinstance(given, dict)
        return cls.of({str(name): value for name, value in given.items() if name != "_target_"}, LAUNCHER)

    def parameters(self, name: str, comment: str, count: int, processes: int = 1, nodes: int = 1) -> dict[str, Any]:
        """Return the parameters of `count` jobs as submitit's executor names them.

        Each is of so many `processes` on each of so many `nodes`.
        """
        chosen = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "gpus_per_node": self.gpus or None,
            "mem": None if self.memory_gb is None else f"{round(self.memory_gb * 1024)}MB",
        }
        return {
            **{key: value for key, value in chosen.items() if value is not None},
            "job_name": name,
            "comment": comment,
            "time": max(1, round(60 * self.hours)),
            "nodes": nodes,
            "ntasks_per_node": processes,
            "cpus_per_task": self.cpus,
            "array_parallelism": self.at_once or count,
            "stderr_to_stdout": True,
            # Processes of one job wait for each other: where one dies, the job has died.
            "srun_args": ["--kill-on-bad-exit=1"],
            # Slurm queues a job again whose node failed or that another took the place of, unless the cluster forbids.
            "additional_parameters": {"requeue": True, **self.sbatch},
        }


def slurm_launcher() -> SlurmSettings | None:
    """Return the settings of hydra/launcher=slurm where this command was given it, else None."""
    if not HydraConfig.initialized() or HydraConfig.get().launcher.get("_target_") != SLURM:
        return None
    return SlurmSettings.of_launcher(HydraConfig.get().launcher)


def output_folder() -> Path:
    """Return the folder that Hydra made for this command."""
    return Path(HydraConfig.get().runtime.output_dir)
