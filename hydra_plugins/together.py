"""A Hydra launcher that trains the jobs of a sweep side by side, in one pass over the cache.

Hydra takes launchers from modules below `hydra_plugins` only, and looks for them on the path, so from the checkout.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn


class Together(BasicLauncher):
    """Makes each job's folder and records as Hydra's own launcher does, then trains what all of them ask for."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from data import cli
        from train.run import Job, asked, train_all

        jobs: list[Job] = []
        self.task_function = lambda config: jobs.append(asked(config))
        done = super().launch(job_overrides, initial_job_idx)
        for job in done:
            _ = job.return_value  # raises what kept it from being composed
        cli.attempt(lambda: train_all(jobs))
        return done
