"""A harvest by jobs of Slurm: workers of one command, which share it as any processes do (data/storage/leases.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.base.errors import UserError
from data.base.records import canonical
from data.slurm.queue import check_slurm
from data.slurm.records import JobFolder
from data.slurm.settings import LAUNCHER, SlurmSettings
from data.slurm.watch import Keeper, Standing, raise_failed
from data.store.store import Store
from harvest import lm
from harvest.request import HarvestRequest
from harvest.summary import advice, summary
from harvest.units import covered, finish

Harvest = Callable[[Mapping[str, Any]], Store]


@dataclass(frozen=True)
class Worker:
    """What a job does: the whole command, of which it finds some units left to do."""

    harvest: Harvest
    settings: Mapping[str, Any]

    def __call__(self) -> None:
        self.harvest(self.settings)


class HarvestWork:
    """The workers `1` to `count` of a harvest; how far it is, its store says."""

    noun, unit = "workers", "rows"
    processes = nodes = 1

    def __init__(self, request: HarvestRequest, count: int, job: Callable[[], None]) -> None:
        self.request, self.work = request, job
        self.sizes = {str(number): 1 for number in range(1, count + 1)}
        self.total = sum(request.rows.values())
        self.look = f".venv/bin/python -m data list {request.cache}"
        self.again = "the same command"
        self._store: Store | None = None

    @cached_property
    def _identity(self) -> dict[str, Any]:
        # Once: it reads the whole text and the model's files.
        return self.request.identity(lm.load_tokenizer(self.request.asked.model))

    @property
    def store(self) -> Store | None:
        """Return the store, once a worker has made it."""
        if self._store is None:
            self._store = self.request.existing_store(self._identity)
        return self._store

    def is_done(self, item: str) -> bool:
        """Return False: a worker's job says when it finds nothing left to do."""
        return False

    def progress(self) -> int:
        """Count the rows that are committed at every site."""
        if self.store is None:
            return 0
        done = 0
        for split, wanted in self.request.rows.items():
            sites = self.request.asked.sites
            rows = [sum(c.rows for c in self.store.committed(split, str(site)).values()) for site in sites]
            done += min(wanted, *rows)
        return done

    def complete(self) -> bool:
        """Return whether the store holds all that was asked for."""
        return self.store is not None and covered(self.store, self.request.asked.sites, self.request.rows)

    def cut(self, items: Sequence[str]) -> list[list[str]]:
        """Give each worker a job of its own."""
        return [[item] for item in items]

    def job(self, items: Sequence[str]) -> Callable[[], None]:
        """Return what a worker's job does."""
        return self.work


def harvest_by_jobs(settings: Mapping[str, Any], slurm: SlurmSettings, folder: Path, harvest: Harvest) -> None:
    """Let workers on Slurm do what `harvest` would here, and wait until the store is complete.

    folder: the records and logs of all such harvests. UserError where the workers failed before it was.
    """
    if slurm.saes_per_job is not None:
        raise UserError(f"{LAUNCHER}.saes_per_job is for sweeps of train: give a harvest {LAUNCHER}.workers")
    if settings["model"].get("tp_plan") is not None:
        raise UserError(
            "model.tp_plan is for torchrun, and a worker's job is one process: use model.device_map=auto with "
            f"{LAUNCHER}.gpus"
        )
    check_slurm()
    request = HarvestRequest.from_config(settings)
    digest = hashlib.sha256(canonical(settings).encode()).hexdigest()[:12]
    work = HarvestWork(request, slurm.workers or 1, Worker(harvest, settings))
    by_item: dict[str, Standing] = {}
    if not work.complete():
        by_item = Keeper(work, JobFolder(folder / digest), slurm).run()
    if not work.complete():
        raise_failed(work.noun, by_item)
    store = work.store
    assert store is not None
    finish(store)
    print(
        f"{store.path} holds all of it ({summary(store)})" if work.complete() else f"the text ended: {summary(store)}"
    )
    print("\n".join(advice(store, request.asked.sites)))
