"""What a busy neighbour costs: training steps, a harvest and an evaluation beside busy processes, as a ratio to alone.

    python -m benchmarks.neighbour [--rounds 7] [--variants batchtopk topk ...] [--parts step harvest evaluation]
    OMP_WAIT_POLICY=active python -m benchmarks.neighbour     # threads that spin while they wait, for comparison

A neighbour is a process that computes without end. Each round measures every part alone, beside one neighbour, and
beside one a core, in turn (the neighbours are stopped and continued); the ratio is taken within a round, and the
figure is the median over rounds with its quartiles. One neighbour a core leaves half of each core, so 2 is fair; the
goal is at most 2.5. The machine's load before the first round is printed: a machine that is shared already has
neighbours, and the ratios are then too small.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.contestants.spec import VARIANTS, Spec
from data.base.cli import keep_freed_memory  # data sets OMP_WAIT_POLICY before torch starts its threads

GOAL = 2.5
BUSY = "while True: pass"

Part = Callable[[], object]


class Neighbours:
    """Busy processes, of which any number runs at a time."""

    def __init__(self, count: int) -> None:
        self.processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        self.run(0)

    def run(self, count: int) -> None:
        """Let so many of them run, the others stand still."""
        for number, process in enumerate(self.processes):
            process.send_signal(signal.SIGCONT if number < count else signal.SIGSTOP)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def neighbours(count: int) -> Iterator[Neighbours]:
    made = Neighbours(count)
    try:
        yield made
    finally:
        made.end()


def training_step(variant: str, d_model: int, width: int, k: int, batch: int, steps: int) -> Part:
    """Return a task: some training steps of a variant, as `benchmarks.step` has them."""
    from benchmarks.contestants import ours
    from benchmarks.step import mixture

    batches = mixture(batch, d_model)
    contestant = ours.make("ours", Spec(variant, d_model, width, k, batch, l0=float(k)), batches[0])

    def run() -> None:
        for number in range(steps):
            contestant.step(batches[number % len(batches)])

    return run


def harvest(folder: Path) -> Part:
    """Return a task: a harvest of one site of the embedded model into a new store."""
    from benchmarks import harvest as benchmark

    trial = benchmark.embedded()
    return benchmark.ours(trial, folder, "float32", 1, 1)


def evaluation() -> Part:
    """Return a task: a batch of contexts scored with one SAE in the embedded model."""
    from benchmarks import evaluate as benchmark
    from data.base.sites import Site
    from evaluate.score import SiteScore
    from evaluate.splice import Splice
    from harvest import lm
    from harvest.hooks import run_to

    model, site = lm.load_model(benchmark.MODEL), Site.parse("resid_post.3")
    ids = torch.randint(3, 1000, (16, 256), generator=torch.Generator().manual_seed(0))
    keep = torch.ones(ids.shape, dtype=torch.bool)
    rows_ND = run_to(model, [site], ids)[str(site)].flatten(0, 1)
    sae = benchmark.started(rows_ND)
    score = SiteScore(Splice(model, site), [sae], rows_ND.double().mean(0), torch.float32, (len(ids), ids.shape[1]))
    return lambda: score.batch(ids, keep, 0)


def measure(parts: dict[str, Part], counts: Sequence[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Return {part: {neighbours: seconds of each round}};
    the order of counts turns, so that no count is always first."""
    seconds: dict[str, dict[int, list[float]]] = {name: {count: [] for count in counts} for name in parts}
    with neighbours(max(counts)) as busy:
        for part in parts.values():
            part()  # warms up
        for number in range(rounds):
            first = number % len(counts)
            for count in (*counts[first:], *counts[:first]):
                busy.run(count)
                for name, part in parts.items():
                    began = time.perf_counter()
                    part()
                    seconds[name][count].append(time.perf_counter() - began)
        busy.run(0)
    return seconds


def ratios(seconds: dict[int, list[float]], count: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of a round's seconds beside `count` neighbours over those alone."""
    values = [beside / alone for beside, alone in zip(seconds[count], seconds[0], strict=True)]
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def table(measured: dict[str, dict[int, list[float]]]) -> str:
    """Write the table, a row a part."""
    counts = [count for count in next(iter(measured.values())) if count]
    heads = ["", "alone, ms", *(f"beside {count}, times" for count in counts), "goal"]
    lines = ["| " + " | ".join(heads) + " |", "| :-- |" + " --: |" * (len(heads) - 1)]
    for name, seconds in measured.items():
        cells = [name, f"{1e3 * statistics.median(seconds[0]):.0f}"]
        for count in counts:
            low, middle, high = ratios(seconds, count)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        worst = max(ratios(seconds, count)[1] for count in counts)
        cells.append("met" if worst <= GOAL else "missed")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=["step", "harvest", "evaluation"], default=None)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="of a variant in a round")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs"), help="where the trial store is put, for the run"
    )
    options = parser.parse_args(arguments)
    keep_freed_memory()
    wanted = options.parts or ["step", "harvest", "evaluation"]
    load = "load of the machine before: " + ", ".join(f"{value:.1f}" for value in os.getloadavg())
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{cores} cores, {torch.get_num_threads()} threads, OMP_WAIT_POLICY={policy}; {load}", flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        parts: dict[str, Part] = {}
        if "step" in wanted:
            sizes = (options.d_model, options.width, options.k, options.batch, options.steps)
            parts |= {
                f"{options.steps} steps, {variant}": training_step(variant, *sizes) for variant in options.variants
            }
        if "harvest" in wanted:
            parts["harvest"] = harvest(Path(name))
        if "evaluation" in wanted:
            parts["evaluation"] = evaluation()
        print(table(measure(parts, sorted({0, 1, cores}), options.rounds)))


if __name__ == "__main__":
    main()
