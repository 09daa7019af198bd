"""One contestant in a process of its own, stepping on request.

    python -m benchmarks.contestants.worker NAME MODULE SPEC BATCHES

It says when it is ready; then a line on stdin is answered by a line of JSON: a number n by {"seconds", "peak_mb",
"device_mb"} of n steps, `facts` by the contestant's facts. SPEC is JSON; BATCHES a file of torch with the batches
[n, B, D]. Memory is read as Linux tells it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.floors import wait
from benchmarks.contestants.spec import Spec


def resident(field: str) -> int:
    """Return VmRSS, or VmHWM: the most there was since `forget_peak`; bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def forget_peak(device: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def rehearse(make: Any, name: str, spec: Spec) -> None:
    """Run a step of a tiny one, so that what is loaded on first use is loaded before memory is counted."""
    tiny = replace(spec, d_model=16, width=96, k=4, batch=32, l0=8.0)
    x_BD = torch.randn(tiny.batch, tiny.d_model, device=tiny.device)
    contestant = make(name, tiny, x_BD)
    contestant.step(x_BD)
    contestant.facts(x_BD)
    torch.mm(torch.ones(512, 512, device=spec.device), torch.ones(512, 512, device=spec.device))


class Stepper:
    """The contestant, its batches in turn, and its memory above what the process held before it was made."""

    def __init__(self, make: Any, name: str, spec: Spec, batches: Tensor) -> None:
        self.device, self.batches, self.done = spec.device, batches, 0
        self.on_gpu = torch.device(spec.device).type == "cuda"
        gc.collect()
        self.before = resident("VmRSS"), torch.cuda.memory_allocated(spec.device) if self.on_gpu else 0
        self.contestant = make(name, spec, batches[0])
        gc.collect()
        forget_peak(spec.device)

    def run(self, steps: int) -> dict[str, float]:
        wait(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.contestant.step(self.batches[self.done % len(self.batches)])
            self.done += 1
        wait(self.device)
        seconds = time.perf_counter() - began
        on_device = torch.cuda.max_memory_allocated(self.device) - self.before[1] if self.on_gpu else 0
        return {
            "seconds": seconds,
            "peak_mb": (resident("VmHWM") - self.before[0]) / 1e6,
            "device_mb": on_device / 1e6,
        }

    def facts(self) -> dict[str, float]:
        return dict(self.contestant.facts(self.batches[0]))


def main() -> None:
    name, module, spec_json, path = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    spec = Spec(**json.loads(spec_json))
    torch.manual_seed(0)
    rounding = torch.device(spec.device).type == "cuda" and spec.precision != "float32"
    torch.set_float32_matmul_precision("high" if rounding else "highest")  # as train/fit.py
    make = importlib.import_module(module).make
    rehearse(make, name, spec)
    stepper = Stepper(make, name, spec, torch.load(path).to(spec.device))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = line.strip()
        answer = stepper.facts() if asked == "facts" else stepper.run(int(asked))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
