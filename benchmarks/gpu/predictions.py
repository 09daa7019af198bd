"""What a step should take on one H100, by estimate, to be read beside what a card says.

The roofline counts the encoder's product at 400 TFLOP/s (tf32), k B rows of W_dec gathered once from memory, as many
rows of gradient and of x gathered from the L2 cache, and Adam on both matrices with the gradient written and read once
(64 bytes an entry of F x D) at 3.0 TB/s. A reading that misses an estimate by more than 1.5 either way says that the
estimate is wrong there. Letters: B tokens in a batch, D model width, F latents.
"""

from __future__ import annotations

TF32_FLOPS = 400e12
MEMORY_BYTES = 3.0e12  # a second
CACHE_BYTES = 5.0e12  # a second, of gathers that the L2 cache serves
ADAM_BYTES = 64  # an entry of W: gradient written and read, parameter and two moments of both matrices read and written

# Milliseconds a BatchTopK step was expected to take by the code of the first GPU path, tf32, d=768, B=4096, k=32.
FIRST_PATH_MS = {12_288: 1.9, 49_152: 5.1, 262_144: 22.0, 1_048_576: 88.0}


def roofline_ms(batch: int, d_model: int, width: int, k: int) -> float:
    """Estimate the least milliseconds of a BatchTopK or TopK step."""
    product = 2 * batch * d_model * width / TF32_FLOPS
    rows = batch * k * d_model
    gathers = 4 * rows / MEMORY_BYTES + 2 * 2 * rows / CACHE_BYTES
    adam = ADAM_BYTES * width * d_model / MEMORY_BYTES
    return 1e3 * (product + gathers + adam)


def roofline_bytes(batch: int, d_model: int, width: int, k: int) -> float:
    """Count the bytes of the same step, from memory and from the cache, without the product's own."""
    rows = batch * k * d_model
    return 4 * rows + 2 * 2 * rows + ADAM_BYTES * width * d_model


def state_gb(d_model: int, width: int) -> float:
    """Return the bytes of parameters, gradients and Adam's two moments of W_enc and W_dec in float32, in GB."""
    return 4 * 4 * 2 * width * d_model / 1e9
