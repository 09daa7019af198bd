"""Look after jobs until their work is done: submit what is missing, show one line over all, start again what died."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TextIO

from data.base.clock import clock
from data.base.errors import UserError
from data.slurm.queue import QueuedJob, SlurmSilent, cancel, check_shared, check_slurm, jobs_named
from data.slurm.records import JobFolder, Ticket, submit
from data.slurm.settings import SlurmSettings

ItemState = Literal["missing", "queued", "running", "done", "failed", "cancelled", "died"]

# A network file system shows a job's last file up to half a minute after the queue has let the job go.
_LOOKS_BEFORE_DEAD = 3
_LINE_EVERY = 60.0  # seconds between lines that say the same, where they do not replace each other


class SharedWork(Protocol):
    """What jobs do together: named items, each the work of one job at a time, with a size for the record."""

    noun: str  # of the items: "SAEs"
    unit: str  # of what there is to do: "steps"
    look: str  # the command that shows the jobs
    again: str  # how to look after them again
    total: int  # of what `progress` counts
    processes: int  # of a job on each of its nodes
    nodes: int  # of a job

    @property
    def sizes(self) -> Mapping[str, int]:
        """Return the size of each item, by its name."""

    def is_done(self, item: str) -> bool:
        """Return whether an item's result lies where it belongs."""

    def progress(self) -> int:
        """Return how much is done of `total`."""

    def complete(self) -> bool:
        """Return whether nothing is left to do, whatever the items say."""

    def cut(self, items: Sequence[str]) -> list[list[str]]:
        """Deal items out to jobs."""

    def job(self, items: Sequence[str]) -> Callable[[], None]:
        """Return what a job does for its items."""


@dataclass(frozen=True)
class Standing:
    """How an item stands, the job that has it, and why where this is not as it should be."""

    state: ItemState
    ticket: Ticket | None = None
    why: str = ""

    @property
    def waits(self) -> bool:
        """Return whether a job has it that will run or runs."""
        return self.state in ("queued", "running")


def standings(
    folder: JobFolder, items: Sequence[str], is_done: Callable[[str], bool], queue: Sequence[QueuedJob]
) -> dict[str, Standing]:
    """Tell how each item stands; `queue` was read before this is called."""
    latest = {item: ticket for ticket in folder.tickets() for item in ticket.items}
    jobs = {(job.submission, job.index): job for job in queue}
    by_item = {}
    for item in items:
        ticket = latest.get(item)
        if is_done(item):
            by_item[item] = Standing("done", ticket)
        elif ticket is None:
            by_item[item] = Standing("missing")
        else:
            by_item[item] = _of_ticket(folder, ticket, jobs.get((ticket.submission, ticket.index)))
    return by_item


def _of_ticket(folder: JobFolder, ticket: Ticket, job: QueuedJob | None) -> Standing:
    outcome = folder.outcome(ticket)
    if outcome is not None:
        return Standing("failed", ticket, outcome.error) if outcome.error else Standing("done", ticket)
    if job is not None and job.alive:
        return Standing("queued", ticket, job.reason) if job.queued else Standing("running", ticket)
    if job is not None and job.state == "CANCELLED":
        return Standing("cancelled", ticket, "its job was cancelled")
    ended = "is no longer in the queue" if job is None else f"ended as {job.state}"
    log = folder.log(ticket)
    if log is None:
        return Standing("died", ticket, f"its job {ended} and wrote nothing: do the nodes see {folder.path}?")
    return Standing("died", ticket, f"its job {ended}, see {log}")


def status_line(noun: str, by_item: Mapping[str, Standing]) -> str:
    """Count the items by state."""
    counts = Counter("failed" if one.state in ("died", "cancelled") else one.state for one in by_item.values())
    parts = [
        f"{counts['done']}/{len(by_item)} {noun} done",
        f"{counts['running']} running",
        f"{counts['queued']} queued",
    ]
    reasons = sorted({one.why for one in by_item.values() if one.state == "queued"} - {"", "None"})
    if reasons and not counts["running"]:
        parts[-1] += f" ({', '.join(reasons)})"
    parts.append(f"{counts['failed']} failed")
    if counts["missing"]:
        parts.append(f"{counts['missing']} not submitted")
    return ", ".join(parts)


class ProgressLine:
    """One line: rewritten on a terminal; in a file a new one where it has changed much, or a minute has gone by."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.shown = ""
        self.shown_at = 0.0

    def show(self, counts: str, rest: str) -> None:
        """Show what counts, and what goes on changing behind it."""
        now = time.monotonic()
        if self.live:
            self.stream.write(f"\r\033[K{counts}{rest}")
        elif counts != self.shown or now - self.shown_at > _LINE_EVERY:
            self.stream.write(f"{counts}{rest}\n")
            self.shown_at = now
        self.shown = counts
        self.stream.flush()

    def end(self) -> None:
        """Leave the line as it stands."""
        if self.live and self.shown:
            self.stream.write("\n")


class Keeper:
    """Submits the jobs of `work` and looks after them; `sleep` waits between two looks."""

    def __init__(
        self,
        work: SharedWork,
        folder: JobFolder,
        settings: SlurmSettings,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.work, self.folder, self.settings, self.sleep = work, folder, settings, sleep
        self.line = ProgressLine()
        self.restarts: Counter[str] = Counter()  # by item
        self.dead_looks: Counter[tuple[int, int]] = Counter()  # by submission and index
        self.given_up: dict[str, Standing] = {}
        self.began_at = time.monotonic()
        self.began_with = 0

    def run(self) -> dict[str, Standing]:
        """Go on until each item is done or has failed, and return how they stand; on Ctrl-C the jobs go on."""
        check_slurm()
        check_shared(self.folder.path)
        with self.folder.only_keeper(self.work.look):
            try:
                self._begin()
                by_item = self._watch()
            except KeyboardInterrupt:
                self.line.end()
                print(f"the jobs go on; {self.how_to()}")
                raise SystemExit(130) from None
            self.line.end()
            return by_item

    def how_to(self) -> str:
        """Say how to look again and how to cancel."""
        look = f"look again with {self.work.look}, look after them with {self.work.again}"
        return f"{look}, cancel them with scancel --name={self.folder.name}"

    def _begin(self) -> None:
        """Submit what no job has that waits or runs; where Slurm does not answer, nothing is submitted."""
        queue = jobs_named(self.folder.name)
        alive = [job for job in queue if job.alive]
        by_item = standings(self.folder, list(self.work.sizes), self.work.is_done, queue)
        # Not by what jobs said earlier: results may have been removed since, and what failed is tried again.
        attached = [item for item, one in by_item.items() if one.waits]
        left = [item for item in self.work.sizes if item not in attached and not self.work.is_done(item)]
        if attached:
            print(f"{len(alive)} jobs of this command are there already, with {len(attached)} {self.work.noun}")
        if left:
            self._submit(self.work.cut(left))
        self.began_with = self.work.progress()

    def _submit(self, shares: Sequence[Sequence[str]]) -> None:
        sizes = self.work.sizes
        items = [{item: sizes[item] for item in share} for share in shares]
        works = [self.work.job(share) for share in shares]
        number = submit(self.folder, items, works, self.settings, self.work.processes, self.work.nodes)
        count = f"{len(shares)} jobs" if len(shares) > 1 else "1 job"
        print(f"submitted {count} as {self.folder.name}, logs in {self.folder.path / str(number)}", flush=True)

    def _watch(self) -> dict[str, Standing]:
        items = list(self.work.sizes)
        while True:
            try:
                queue = jobs_named(self.folder.name)
            except SlurmSilent as error:  # a controller that is started anew: the jobs run on without it
                self.line.show(str(error), "")
                self.sleep(self.settings.poll_seconds)
                continue
            by_item = self._start_again(standings(self.folder, items, self.work.is_done, queue))
            self.line.show(status_line(self.work.noun, by_item), self._rest())
            if self.work.complete():
                with contextlib.suppress(SlurmSilent):  # they would find nothing to do
                    cancel([job for job in queue if job.queued])
                return by_item
            if not any(one.waits or one.state == "died" for one in by_item.values()):
                return by_item
            self.sleep(self.settings.poll_seconds)

    def _start_again(self, by_item: dict[str, Standing]) -> dict[str, Standing]:
        """Submit again what died, as often as is allowed; what may not be has failed."""
        dead = list(_dead(by_item))
        # In succession: a job that Slurm queues again is for a moment in no state of one that will run.
        still = {(ticket.submission, ticket.index) for ticket, _ in dead}
        self.dead_looks = Counter({key: looks for key, looks in self.dead_looks.items() if key in still})
        for ticket, share in dead:
            key = (ticket.submission, ticket.index)
            self.dead_looks[key] += 1
            if self.dead_looks[key] < _LOOKS_BEFORE_DEAD or share[0] in self.given_up:
                continue
            why = by_item[share[0]].why
            if max(self.restarts[item] for item in share) >= self.settings.restarts:
                often = f", after {self.settings.restarts} restarts" if self.settings.restarts else ""
                self.given_up |= {item: Standing("failed", ticket, f"{why}{often}") for item in share}
                continue
            self.restarts.update(share)
            self.line.end()
            print(f"{', '.join(share)}: {why}; it is started again", file=sys.stderr)
            self._submit([share])
            by_item |= {item: Standing("queued") for item in share}
        return by_item | {item: one for item, one in self.given_up.items() if by_item[item].state == "died"}

    def _rest(self) -> str:
        """Say how much is done, and when the rest will be at the pace since this command began."""
        total, done = self.work.total, self.work.progress()
        rate = (done - self.began_with) / max(time.monotonic() - self.began_at, 1e-9)
        left = f"  ETA {clock((total - done) / rate)}" if rate > 0 and done < total else ""
        return f"  {done:,}/{total:,} {self.work.unit}{left}"


def _dead(by_item: Mapping[str, Standing]) -> Iterator[tuple[Ticket, list[str]]]:
    """Yield each job that died with those of its items that are not done."""
    jobs: dict[tuple[int, int], tuple[Ticket, list[str]]] = {}
    for item, one in by_item.items():
        if one.state == "died" and one.ticket is not None:
            key = (one.ticket.submission, one.ticket.index)
            jobs.setdefault(key, (one.ticket, []))[1].append(item)
    yield from jobs.values()


def raise_failed(noun: str, by_item: Mapping[str, Standing]) -> None:
    """Raise UserError in one sentence for what failed."""
    failed = {item: one.why for item, one in by_item.items() if one.state in ("failed", "cancelled", "died", "missing")}
    if not failed:
        return
    if len(set(failed.values())) == 1:
        reason = next(iter(failed.values()))
        raise UserError(f"{len(failed)} of {len(by_item)} {noun} failed: {reason}")
    each = "; ".join(f"{item} ({why})" for item, why in failed.items())
    raise UserError(f"{len(failed)} of {len(by_item)} {noun} failed: {each}")
