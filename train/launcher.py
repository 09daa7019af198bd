"""Hydra launchers: the SAEs of a sweep side by side in one pass over the cache, here or as jobs of Slurm."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn

from data.base import cli
from data.base.errors import UserError

if TYPE_CHECKING:
    from train.run import TrainRequest


class SinglePassLauncher(BasicLauncher):
    """Makes each job's folder and records as Hydra's own launcher does, then trains what all of them ask for."""

    __module__ = "hydra_plugins.together"  # Hydra takes launchers of this package only, by name

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from train.run import request_of

        jobs: list[TrainRequest] = []
        self.task_function = lambda config: jobs.append(request_of(config))
        done = super().launch(job_overrides, initial_job_idx)
        for job in done:
            _ = job.return_value  # raises what kept it from being composed
        cli.guarded(lambda: self.train(jobs))
        return done

    def train(self, jobs: Sequence[TrainRequest]) -> None:
        """Train what the jobs ask for."""
        from train.run import train_all

        train_all(jobs)


class SlurmLauncher(SinglePassLauncher):
    """Trains what the jobs of a sweep ask for in jobs of Slurm, and looks after these."""

    __module__ = "hydra_plugins.slurm"

    def __init__(self, **launcher: Any) -> None:
        super().__init__()
        self.launcher = launcher

    def train(self, jobs: Sequence[TrainRequest]) -> None:
        """Submit what is not trained and has no job yet, and wait for all of it; UserError names what failed."""
        from data.slurm.queue import check_slurm
        from data.slurm.records import JobFolder
        from data.slurm.settings import LAUNCHER, SlurmSettings
        from data.slurm.watch import Keeper, raise_failed
        from train.slurm import JOBS, NOUN, SweepWork, results

        asked = SlurmSettings.of_launcher(self.launcher)
        if asked.workers is not None:
            raise UserError(f"{LAUNCHER}.workers is for a harvest: give a sweep {LAUNCHER}.saes_per_job")
        check_slurm()
        sweep, requests, sizes, groups = _of_sweep(jobs)
        work = SweepWork(
            sweep, sizes, groups, asked.saes_per_job, lambda items: TrainShare([requests[item] for item in items])
        )
        found = Keeper(work, JobFolder(sweep / JOBS), asked).run()
        print(results(sweep, list(sizes)))
        raise_failed(NOUN, found)


@dataclass(frozen=True)
class TrainShare:
    """What a job of Slurm does: train its share of a sweep as one process trains all of it."""

    jobs: Sequence[TrainRequest]

    def __call__(self) -> None:
        from train.run import train_all

        train_all(self.jobs)


def _of_sweep(
    jobs: Sequence[TrainRequest],
) -> tuple[Path, dict[str, TrainRequest], dict[str, int], list[list[str]]]:
    """Check the jobs as far as this machine can, and name each by its folder below the sweep's.

    Returns the sweep's folder, the jobs, their steps, and the groups of those not trained yet that can share a pass.
    """
    from train.plan import DataPlan, TrainRun, group_by_stream
    from train.run import prepare
    from train.slurm import steps_trained

    sweep = jobs[0].sweep
    assert sweep is not None
    plans: dict[str, DataPlan] = {}
    requests: dict[str, TrainRequest] = {}
    sizes: dict[str, int] = {}
    runs: list[TrainRun] = []
    for job in jobs:
        item = os.path.relpath(job.folder, sweep)
        if item in requests:
            raise UserError(f"{job.folder} is the folder of several jobs: make hydra.sweep.subdir tell them apart")
        requests[item] = job
        run = prepare(job, plans, shapes_only=True)
        if run is None:
            sizes[item] = steps_trained(job.folder)
        else:
            sizes[item] = run.plan.steps
            runs.append(run)
    groups = [[os.path.relpath(run.folder, sweep) for run in group] for group in group_by_stream(runs)]
    return sweep, requests, sizes, groups


def register() -> None:
    """Let Hydra find the launchers by the names it asks of plugins, as if they lay in an installed `hydra_plugins`."""
    plugins = Plugins.instance()  # imports what is installed there first
    sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    launchers: list[type[SinglePassLauncher]] = [SinglePassLauncher, SlurmLauncher]
    for launcher in launchers:
        sys.modules[launcher.__module__] = sys.modules[__name__]
        plugins.register(launcher)
