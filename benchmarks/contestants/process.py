"""The contestants by name, and one of them in a process of its own, from the side that asks."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants.spec import VARIANTS, Spec

ROOT = Path(__file__).resolve().parents[2]
OURS, FLOOR, DENSE = "ours", "sparse-floor", "five-dense-products"
OURS_BF16 = "ours-bf16"  # with the encoder's product in bf16, whatever the others have


@dataclass(frozen=True)
class Entry:
    """Where a contestant is made (a module of this folder) and what it can train."""

    module: str
    variants: tuple[str, ...] = VARIANTS
    peer: bool = True


_PROJECTED = ("topk", "batchtopk", "matryoshka", "jumprelu")  # the trainers of dictionary_learning with that einsum
ENTRIES = {
    FLOOR: Entry("floors", peer=False),
    DENSE: Entry("floors", peer=False),
    OURS: Entry("ours", peer=False),
    OURS_BF16: Entry("ours", peer=False),
    "sae-lens": Entry("sae_lens"),
    "sae-lens-sparse": Entry("sae_lens", ("topk",)),
    "dictionary-learning": Entry("dictionary_learning"),
    "dictionary-learning-repaired": Entry("dictionary_learning", _PROJECTED),
    "sparsify": Entry("sparsify", ("topk",)),
    "sparsify-adam": Entry("sparsify", ("topk",)),
}


_QUIET = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
# data.base.cli.keep_freed_memory for a process that cannot call it.
_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(256 << 20)}


class Failed(Exception):
    """A contestant that ended instead of answering: its last words."""


class Process:
    """Asks a worker; a context manager that ends it. `kept`: its C allocator keeps freed memory."""

    def __init__(self, name: str, spec: Spec, batches: Path, *, python: Path, threads: int, kept: bool) -> None:
        entry = ENTRIES[name]
        self.name = name
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        module = f"benchmarks.contestants.{entry.module}"
        worker = ["-W", "ignore", "-m", "benchmarks.contestants.worker"]
        self.process = subprocess.Popen(
            [str(python), *worker, name, module, json.dumps(asdict(spec)), str(batches)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **_QUIET, **(_KEPT if kept else {}), "OMP_NUM_THREADS": str(threads)},
        )

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words say more
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            self.log.seek(0)
            words = [line.strip() for line in self.log if line.strip()]
            raise Failed(" / ".join(words[-2:]) or f"ended with {code}")
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def ready(self) -> None:
        """Wait until it is made: called once, before anything is asked."""
        self._answer()

    def run(self, steps: int) -> dict[str, float]:
        return self._ask(str(steps))

    def facts(self) -> dict[str, float]:
        return self._ask("facts")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
