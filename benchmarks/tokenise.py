"""Tokens a second of tokenising a text into a cache, by 1, 2 ... processes, beside the tokenizer alone.

    python -m benchmarks.tokenise --text texts/*.jsonl [--model embedded] [--processes 1 2] [--documents 4000]
                                  [--rounds 3]

In each round, in turn: the tokenizer over the same documents from memory, `ENCODE_AT_ONCE` at a time; then a fresh
cache for each number of processes, which begin together once they have imported everything; then the same cache read
as a second site reads it, every context once. The tokenizer has one thread a process throughout. Prints tokens a second
by the clock and by the CPU seconds of all processes, which a busy machine changes little: each the median over the
rounds with its range, and the ratio to the tokenizer alone within a round. The load is the machine's before the first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.store.manifest import TRAIN
from data.store.token_store import TokenStore
from harvest import lm
from harvest.document_order import DocumentOrder
from harvest.encoding import encoded
from harvest.packing import Packing
from harvest.text_files import FilesText
from harvest.tokenise import Tokeniser

CONTEXT = 256
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "true"}


class FirstDocuments(FilesText):
    """The first documents of files."""

    most: int = 1000
    """How many."""

    def documents(self) -> Any:
        yield from islice(super().documents(), self.most)


def packing() -> Packing:
    """Return the packing whose text is tokenised: all of it, in a harvest's own order."""
    return Packing(context=CONTEXT, bos="document", heldout=0.0)


@dataclass(frozen=True)
class Took:
    """Seconds of a way to tokenise, by the clock and of all CPUs."""

    clock: float
    cpu: float

    @classmethod
    def since(cls, clock: float, cpu: float) -> Took:
        """Count from a time of `time.perf_counter` and one of `time.process_time`."""
        return cls(time.perf_counter() - clock, time.process_time() - cpu)


def alone(source: FirstDocuments, tokenizer: Any) -> tuple[Took, int]:
    """Tokenise the documents from memory; returns what it took and the tokens."""
    rule = packing()
    texts = list(DocumentOrder(source, rule.shuffle, rule.heldout).texts(TRAIN))
    began = time.perf_counter(), time.process_time()
    tokens = sum(len(doc.ids) for doc in encoded(texts, tokenizer))
    return Took.since(*began), tokens


def work(cache: Path, source: FirstDocuments, model: str, rows: int, start: Any, ends: Any) -> None:
    """Wait for the others, tokenise beside them, and say when it was done."""
    tokenizer = lm.load_tokenizer({"name": model})
    store = TokenStore.create_or_open(cache, {"benchmark": "tokenise"}, {})
    start.wait()
    began, cpu = time.perf_counter(), time.process_time()
    Tokeniser(store, source, tokenizer, packing(), quiet=True).text(TRAIN, rows)
    ends.put((began, time.perf_counter(), time.process_time() - cpu))


def together(cache: Path, source: FirstDocuments, model: str, rows: int, count: int) -> Took:
    """Tokenise into a cache by so many processes; the clock goes from the first start to the last end."""
    context = multiprocessing.get_context("spawn")
    start, ends = context.Barrier(count), context.Queue()
    processes = [context.Process(target=work, args=(cache, source, model, rows, start, ends)) for _ in range(count)]
    for process in processes:
        process.start()
    times: list[tuple[float, float, float]] = [ends.get(timeout=3600) for _ in processes]
    for process in processes:
        process.join()
    begins, stops, cpus = zip(*times, strict=True)
    return Took(max(stops) - min(begins), sum(cpus))


def read_again(cache: Path, source: FirstDocuments, tokenizer: Any, rows: int) -> Took:
    """Read every context of a text that is tokenised, as a second site does."""
    store = TokenStore.create_or_open(cache, {"benchmark": "tokenise"}, {})
    began = time.perf_counter(), time.process_time()
    text = Tokeniser(store, source, tokenizer, packing(), quiet=True).text(TRAIN, rows)
    for first in range(0, text.n_contexts, CONTEXT):
        text.read(slice(first, first + CONTEXT))
    return Took.since(*began)


def measure(
    source: FirstDocuments, model: str, counts: Sequence[int], rounds: int
) -> tuple[int, dict[str, list[Took]]]:
    """Return the tokens of the text, and what each way took in each round."""
    tokenizer = lm.load_tokenizer({"name": model})
    seconds: dict[str, list[Took]] = {}
    tokens = 0
    for _ in range(rounds):
        took, tokens = alone(source, tokenizer)
        seconds.setdefault("the tokenizer alone", []).append(took)
        # All but a last part of a context: asking for more than there is would be a mistake.
        rows = tokens - 2 * CONTEXT
        for count in counts:
            cache = Path(tempfile.mkdtemp())
            took = together(cache, source, model, rows, count)
            seconds.setdefault(f"{count} process{'es' if count > 1 else ''}", []).append(took)
            if count == counts[-1]:
                seconds.setdefault("read again", []).append(read_again(cache, source, tokenizer, rows))
            shutil.rmtree(cache)
    return tokens, seconds


def table(tokens: int, ways: dict[str, list[Took]]) -> list[str]:
    """Return the lines of the Markdown table."""
    lines = [
        "| | tokens/s | range | to alone | tokens/CPU s | range | to alone |",
        "| :-- | --: | :-- | --: | --: | :-- | --: |",
    ]
    base = next(iter(ways.values()))
    for way, took in ways.items():
        cells = [way]
        for unit in ("clock", "cpu"):
            speeds = [tokens / getattr(one, unit) for one in took]
            ratios = [getattr(one, unit) / getattr(other, unit) for one, other in zip(base, took, strict=True)]
            cells.append(f"{statistics.median(speeds):,.0f}")
            cells.append(f"{min(speeds):,.0f} to {max(speeds):,.0f}")
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", nargs="+", required=True, help="files of text, as text.paths takes them")
    parser.add_argument("--model", default="embedded", help="whose tokenizer (default embedded)")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    os.environ.update(_ONE_THREAD)  # read by the tokenizer's library at its first text, here and in the processes
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    source = FirstDocuments(paths=options.text, most=options.documents)
    tokens, seconds = measure(source, options.model, options.processes, options.rounds)
    print(f"{tokens:,} tokens, median of {options.rounds} rounds")
    print("\n".join(table(tokens, seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
