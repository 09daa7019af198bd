"""Hydra launchers: the SAEs of a sweep side by side in one pass over the cache, here or as jobs of Slurm."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn

from data.base import cli
from data.base.errors import UserError

if TYPE_CHECKING:
    from train.run import TrainRequest
    from train.slurm import Sweep


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

        settings = SlurmSettings.of_launcher(self.launcher)
        if settings.workers is not None:
            raise UserError(f"{LAUNCHER}.workers is for a harvest: give a sweep {LAUNCHER}.saes_per_job")
        check_slurm()
        requests = _by_item(jobs)
        sweep = _sweep_of(requests)
        if sweep.groups and settings.gpus not in (0, sweep.processes):
            raise UserError(
                f"{LAUNCHER}.gpus={settings.gpus} and trainer.devices={sweep.processes} are one GPU a process: make "
                f"them the same, or set {LAUNCHER}.gpus=0 for CPUs"
            )
        work = SweepWork(sweep, settings.saes_per_job, lambda items: TrainShare([requests[item] for item in items]))
        by_item = Keeper(work, JobFolder(sweep.folder / JOBS), settings).run()
        print(results(sweep.folder, list(sweep.sizes)))
        raise_failed(NOUN, by_item)


@dataclass(frozen=True)
class TrainShare:
    """What a job of Slurm does: train its share of a sweep as one process trains all of it."""

    jobs: Sequence[TrainRequest]

    def __call__(self) -> None:
        from train.run import train_all

        train_all(self.jobs)


def _by_item(jobs: Sequence[TrainRequest]) -> dict[str, TrainRequest]:
    """Name each job by its folder below the sweep's."""
    requests: dict[str, TrainRequest] = {}
    for job in jobs:
        assert job.sweep is not None
        item = os.path.relpath(job.folder, job.sweep)
        if item in requests:
            raise UserError(f"{job.folder} is the folder of several jobs: make hydra.sweep.subdir tell them apart")
        requests[item] = job
    return requests


def _sweep_of(requests: Mapping[str, TrainRequest]) -> Sweep:
    """Check the jobs as far as this machine can; UserError for the first that cannot be trained."""
    from train.plan import DataPlan, TrainRun, group_by_stream
    from train.run import prepare
    from train.slurm import Sweep, steps_trained

    plans: dict[str, DataPlan] = {}
    sizes: dict[str, int] = {}
    runs: dict[str, TrainRun] = {}
    for item, job in requests.items():
        run = prepare(job, plans, shapes_only=True)
        if run is None:
            sizes[item] = steps_trained(job.folder)
        else:
            sizes[item] = run.plan.steps
            runs[item] = replace(run, name=item)
    meshes = {(run.settings.trainer.devices, run.settings.trainer.num_nodes) for run in runs.values()} or {(1, 1)}
    if len(meshes) > 1:
        raise UserError("the SAEs differ in trainer.devices or trainer.num_nodes: give each its own sweep on Slurm")
    processes, nodes = meshes.pop()
    folder = next(iter(requests.values())).sweep
    assert folder is not None
    groups = [[run.name for run in group] for group in group_by_stream(list(runs.values()))]
    return Sweep(folder, sizes, groups, processes, nodes)


def register() -> None:
    """Let Hydra find the launchers by the names it asks of plugins, as if they lay in an installed `hydra_plugins`."""
    plugins = Plugins.instance()  # imports what is installed there first
    sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    launchers: list[type[SinglePassLauncher]] = [SinglePassLauncher, SlurmLauncher]
    for launcher in launchers:
        sys.modules[launcher.__module__] = sys.modules[__name__]
        plugins.register(launcher)
