"""How the threads of a process wait: set before torch is imported, as OpenMP reads it once, when it is loaded.

By default OpenMP's threads spin at the end of each parallel region. Where another process holds one of the cores, every
region then waits for the scheduler, and a training step becomes 10 to 50 times slower. A waiting thread that sleeps
costs nothing measurable on a quiet machine (benchmarks/neighbour.py prints both).
"""

from __future__ import annotations

import os
import sys


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has set OMP_WAIT_POLICY."""
    if "OMP_WAIT_POLICY" not in os.environ:
        assert "torch" not in sys.modules, "OpenMP has read its settings by now: call this before torch is imported"
        os.environ["OMP_WAIT_POLICY"] = "passive"
