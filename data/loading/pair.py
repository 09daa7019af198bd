"""Two sites of one store as one reader: row i of both is the same token, and one loader reads them in one order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.loading.reader import CommittedReader


class PairReader:
    """The chunks that two sites have in common, as rows [first | second]: `first.width` numbers, then the second's.

    A unit's rows are permuted alike for all its sites, so row i of a chunk is the same token in each. Of chunks, the
    first ones are taken up to where the sites differ: one that was added to a store later, or by a harvest that is
    still running, may have fewer. Each site's bytes are read once, whatever reads the pair.
    """

    def __init__(self, first: CommittedReader, second: CommittedReader) -> None:
        assert first.dtype == second.dtype, "the sites of a store have one dtype"
        assert len(first.row_shape) == len(second.row_shape) == 1
        self.first, self.second = first, second
        self.width = first.width + second.width
        self.row_shape = (self.width,)
        self.dtype, self.torch_dtype = first.dtype, first.torch_dtype
        self.sizes = first.sizes[: _alike(first, second)]

    @property
    def bytes_read(self) -> int:
        return self.first.bytes_read + self.second.bytes_read

    def read(self, chunk: int, out: NDArray[Any], start: int = 0) -> None:
        self.scatter(chunk, [out[: int(self.sizes[chunk]) - start]], start)

    def scatter(self, chunk: int, outs: Sequence[NDArray[Any]], start: int) -> None:
        """Fill `outs` one after another with the chunk's rows from `start` on, which must be enough."""
        begins = np.cumsum([0, *map(len, outs)]).tolist()
        for reader, columns in ((self.first, slice(self.first.width)), (self.second, slice(self.first.width, None))):
            # By way of a buffer: a chunk file holds whole rows of one site, which lie apart in rows of both.
            part = np.empty((begins[-1], reader.width), self.dtype)
            reader.read(chunk, part, start)
            for out, (begin, end) in zip(outs, pairwise(begins), strict=True):
                out[:, columns] = part[begin:end]


def _alike(first: CommittedReader, second: CommittedReader) -> int:
    """Count the chunks, from the first on, that stand for the same rows in both."""
    count = min(len(first.numbers), len(second.numbers))
    differs = np.flatnonzero(
        (np.array(first.numbers[:count]) != np.array(second.numbers[:count]))
        | (first.sizes[:count] != second.sizes[:count])
    )
    return int(differs[0]) if len(differs) else count
