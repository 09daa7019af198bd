"""Random words and permutations that depend on a key alone: the same on any machine and numpy version."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def seeded_words(n: int, *key: int | str) -> NDArray[np.uint64]:
    """Return the random words that depend on `key` alone: bit generators are stable between numpy versions."""
    entropy = int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), "little")
    words: NDArray[np.uint64] = np.random.PCG64(entropy).random_raw(n)
    return words


def seeded_permutation(n: int, *key: int | str) -> Ints:
    """Return a permutation of 0..n-1 that depends on `key` alone, on any machine and numpy version.

    Sorts random 64-bit words whose low bits carry the index, so that no two are equal; `Generator.permutation` is not
    promised to stay as it is.
    """
    bits = np.uint64(max(n - 1, 1).bit_length())
    words = seeded_words(n, *key)
    words = np.sort((words >> bits << bits) | np.arange(n, dtype=np.uint64))
    return (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
