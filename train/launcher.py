"""A Hydra launcher that trains the jobs of a sweep side by side, in one pass over the cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn


class SinglePassLauncher(BasicLauncher):
    """Makes each job's folder and records as Hydra's own launcher does, then trains what all of them ask for."""

    __module__ = "hydra_plugins.together"  # Hydra takes launchers of this package only, by name

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from data.base import cli
        from data.base.logs import logged
        from train.run import TrainRequest, request_of, train_all

        jobs: list[TrainRequest] = []
        self.task_function = lambda config: jobs.append(request_of(config))
        done = super().launch(job_overrides, initial_job_idx)
        for job in done:
            _ = job.return_value  # raises what kept it from being composed
        with logged([_log_of(job) for job in done]):
            cli.guarded(lambda: train_all(jobs))
        return done


def _log_of(job: JobReturn) -> Path:
    """Return the log file that Hydra made in the job's folder."""
    assert job.hydra_cfg is not None
    own = job.hydra_cfg.hydra
    return Path(own.runtime.output_dir) / f"{own.job.name}.log"


def register() -> None:
    """Let Hydra find the launcher by the name it asks of plugins, as if it lay in an installed `hydra_plugins`."""
    plugins = Plugins.instance()  # imports what is installed there first
    sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    sys.modules[SinglePassLauncher.__module__] = sys.modules[__name__]
    plugins.register(SinglePassLauncher)
