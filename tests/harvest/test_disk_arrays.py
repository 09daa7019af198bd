"""python -m pytest tests/harvest/test_disk_arrays.py"""

from __future__ import annotations

import hashlib
import random
import tracemalloc

from harvest.disk_arrays import DigestSet


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_a_digest_is_new_once() -> None:
    """Against a set in memory, over several growths of the table."""
    table, seen, rng = DigestSet(), set[int](), random.Random(0)
    for _ in range(20_000):
        number = rng.randrange(12_000)
        assert table.add(digest(number)) == (number not in seen)
        seen.add(number)
    assert len(seen) > 8192


def test_digests_of_one_slot_are_told_apart() -> None:
    table = DigestSet()
    alike = [bytes(8) + bytes([number]) * 8 for number in range(1, 200)]
    assert all(table.add(one) for one in alike) and not any(table.add(one) for one in alike)


def test_digests_are_not_in_memory() -> None:
    table = DigestSet()
    tracemalloc.start()
    for number in range(20_000):
        table.add(digest(number))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100_000  # in a set they would be two megabytes
