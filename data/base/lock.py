"""A short lock on a store, kept by the kernel: it ends with the process that holds it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Be the only one inside, of all processes and threads; `path` is a file that is there, and is not changed.

    To be held for moments: growing an array, making a claim, putting a commit into its place.
    """
    import fcntl

    # Over NFS an exclusive lock needs a file that is open for writing.
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
