"""The store of activations and its loader.

Whatever starts here imports this package before torch, so this is where threads are told how to wait: OpenMP reads
OMP_WAIT_POLICY once, when torch loads it. By default its threads spin at the end of each parallel region, and where
another process holds one of the cores a training step becomes 10 to 50 times slower; threads that sleep cost nothing
that can be measured on a quiet machine (`python -m benchmarks.neighbour` prints both). A value the user set stands.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
