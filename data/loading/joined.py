"""Several sites as one reader: row i of all is the same token, and one loader reads them in one order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.loading.reader import CommittedReader


class JoinedReader:
    """The chunks that all sites have, as rows [first | second | ...], each with the numbers that its site stores.

    A unit's rows are permuted alike for all its sites, so row i of a chunk is the same token in each; in two stores of
    one layout too, where their tokens are the same (`data.loading.same_tokens`). Of chunks, the first ones are taken up
    to where the sites differ: one that was added to a store later, or by a harvest that is still running, may have
    fewer. Each site's bytes are read once, whatever reads them joined.
    """

    def __init__(self, *readers: CommittedReader) -> None:
        first = readers[0]
        assert all(reader.dtype == first.dtype for reader in readers), "joined sites have one dtype"
        assert all(len(reader.row_shape) == 1 for reader in readers)
        self.readers = readers
        self.width = sum(reader.width for reader in readers)
        self.row_shape = (self.width,)
        self.dtype, self.torch_dtype = first.dtype, first.torch_dtype
        self.sizes = first.sizes[: min(_alike(first, reader) for reader in readers)]

    @property
    def bytes_read(self) -> int:
        return sum(reader.bytes_read for reader in self.readers)

    def read(self, chunk: int, out: NDArray[Any], start: int = 0) -> None:
        self.scatter(chunk, [out[: int(self.sizes[chunk]) - start]], start)

    def scatter(self, chunk: int, outs: Sequence[NDArray[Any]], start: int) -> None:
        """Fill `outs` one after another with the chunk's rows from `start` on, which must be enough."""
        begins = np.cumsum([0, *map(len, outs)]).tolist()
        column = 0
        for reader in self.readers:
            # By way of a buffer: a chunk file holds whole rows of one site, which lie apart in rows of all.
            part = np.empty((begins[-1], reader.width), self.dtype)
            reader.read(chunk, part, start)
            for out, (begin, end) in zip(outs, pairwise(begins), strict=True):
                out[:, column : column + reader.width] = part[begin:end]
            column += reader.width


def _alike(first: CommittedReader, other: CommittedReader) -> int:
    """Count the chunks, from the first on, that stand for the same rows in both."""
    count = min(len(first.numbers), len(other.numbers))
    differs = np.flatnonzero(
        (np.array(first.numbers[:count]) != np.array(other.numbers[:count]))
        | (first.sizes[:count] != other.sizes[:count])
    )
    return int(differs[0]) if len(differs) else count
