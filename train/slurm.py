"""A sweep as jobs of Slurm: which SAE goes to which job, and how far they are (`python -m train.slurm <sweep>`)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.base.errors import UserError, to_sentence
from data.slurm.queue import jobs_named
from data.slurm.records import JobFolder
from data.slurm.watch import Standing, standings, status_line

JOBS = "slurm"  # below the folder of a sweep: the records and logs of its jobs
NOUN, UNIT = "SAEs", "steps"
_RECORD = "config.json"  # train.sae.io.CONFIG, whose module brings torch: seconds, where a line is wanted at once
_TAIL = 16_384  # bytes at the end of metrics.csv that surely hold a row


def is_trained(folder: Path) -> bool:
    """Return whether an SAE was saved in `folder`."""
    return (folder / _RECORD).is_file()


def steps_trained(folder: Path) -> int:
    """Read how many steps a saved SAE was trained for."""
    training = json.loads((folder / _RECORD).read_text(encoding="utf-8"))["training"]
    return int(training["steps"])


def steps_done(folder: Path, steps: int) -> int:
    """Read how many of its steps a run has taken, as its last row of metrics.csv says."""
    if is_trained(folder):
        return steps
    try:
        with (folder / "metrics.csv").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return 0
    # The first line of the tail begins anywhere, and what follows the last line's end is half written.
    logged = [int(line.partition(",")[0]) for line in lines[1:-1] if line.partition(",")[0].isdecimal()]
    return min(max(logged, default=0), steps)


@dataclass(frozen=True)
class Sweep:
    """The SAEs of a sweep by the names of their folders below `folder`, and what their jobs need.

    sizes: steps of each. groups: those not trained yet, by the pass that can train them. processes, nodes: of a job.
    """

    folder: Path
    sizes: Mapping[str, int]
    groups: Sequence[Sequence[str]]
    processes: int = 1
    nodes: int = 1


class SweepWork:
    """A sweep as work for jobs, each of which trains at most `per_job` SAEs; `job` makes what it does."""

    noun, unit = NOUN, UNIT

    def __init__(self, sweep: Sweep, per_job: int | None, job: Callable[[Sequence[str]], Callable[[], None]]) -> None:
        self.sweep, self.per_job, self.job = sweep, per_job, job
        self.sizes, self.processes, self.nodes = sweep.sizes, sweep.processes, sweep.nodes
        self.total = sum(sweep.sizes.values())
        self.again = f"the same command and hydra.sweep.dir={sweep.folder}"
        self.look = f".venv/bin/python -m train.slurm {sweep.folder}"

    def is_done(self, item: str) -> bool:
        """Return whether an SAE is trained."""
        return is_trained(self.sweep.folder / item)

    def progress(self) -> int:
        """Count the steps that were taken."""
        return sum(steps_done(self.sweep.folder / item, steps) for item, steps in self.sizes.items())

    def complete(self) -> bool:
        """Return whether all are trained."""
        return all(self.is_done(item) for item in self.sizes)

    def cut(self, items: Sequence[str]) -> list[list[str]]:
        """Deal SAEs out to jobs: never two streams in one, at most `per_job` in one."""
        left = set(items)
        groups = [[item for item in group if item in left] for group in self.sweep.groups]
        return [share for group in groups for share in passes(group, self.per_job)]


def passes(items: Sequence[str], per_job: int | None) -> list[list[str]]:
    """Cut items into shares of at most `per_job`, as equal as can be: the longest pass decides when a sweep ends."""
    if not items:
        return []
    count = 1 if per_job is None else -(-len(items) // per_job)
    small, longer = divmod(len(items), count)
    ends = [small * i + min(i, longer) for i in range(count + 1)]
    return [list(items[start:end]) for start, end in pairwise(ends)]


def results(sweep: Path, items: Sequence[str]) -> str:
    """Say in a line an SAE what those that are trained came to."""
    lines = []
    for item in items:
        if not is_trained(sweep / item):
            continue
        training: dict[str, Any] = json.loads((sweep / item / _RECORD).read_text(encoding="utf-8"))["training"]
        held_out = training["heldout"]
        figures = f"  NMSE {held_out['nmse']:.4f}  L0 {held_out['l0']:.1f}" if held_out else ""
        lines.append(f"  {item}{figures}  dead {training['dead']}  -> {sweep / item}")
    return "\n".join(lines)


def look(sweep: Path) -> str:
    """Say how the jobs of a sweep stand; UserError where none were submitted from there."""
    folder = JobFolder(sweep / JOBS)
    sizes = {item: steps for ticket in folder.tickets() for item, steps in ticket.items.items()}
    if not sizes:
        raise UserError(f"{sweep} is not the folder of a sweep on Slurm (it has no {JOBS}/): give one that has")
    by_item = standings(folder, list(sizes), lambda item: is_trained(sweep / item), jobs_named(folder.name))
    done = sum(steps_done(sweep / item, steps) for item, steps in sizes.items())
    lines = [f"{status_line(NOUN, by_item)}  {done:,}/{sum(sizes.values()):,} {UNIT}"]
    lines += [_line(sweep, item, steps, by_item[item]) for item, steps in sizes.items()]
    return "\n".join(lines)


def _line(sweep: Path, item: str, steps: int, one: Standing) -> str:
    if one.state == "done":
        return results(sweep, [item])
    why = f" ({one.why})" if one.why not in ("", "None") else ""
    return f"  {item}  {one.state}{why}  {steps_done(sweep / item, steps):,}/{steps:,} {UNIT}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print how the sweep stands whose folder is the one argument; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.slurm", description="Show a sweep's jobs on Slurm.")
    parser.add_argument("sweep", type=Path, help="the sweep's folder, as hydra.sweep.dir named it")
    try:
        print(look(parser.parse_args(argv).sweep))
    except UserError as error:
        print(f"error: {to_sentence(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
