"""Which document each token of the packed contexts belongs to: standard errors draw documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from harvest.packing import PackedTokens


@dataclass(frozen=True)
class Documents:
    """Where documents begin in the stream of tokens that S contexts of T tokens were cut from.

    starts: the document beginnings, ascending; of a packing that does not know them it is empty, and each context
    counts as a document. stride: tokens of the stream in a context; the other T - stride stand before them (a BOS).
    """

    starts: NDArray[np.int64]
    stride: int
    context: int
    n_contexts: int

    @classmethod
    def of(cls, packed: PackedTokens) -> Documents:
        """Find the documents of packed text."""
        n_contexts, context = packed.contexts.shape
        return cls(np.asarray(packed.starts), packed.stride, context, n_contexts)

    @classmethod
    def one_a_context(cls, n_contexts: int, context: int) -> Documents:
        """Make each context a document of its own."""
        return cls(np.zeros(0, np.int64), context, context, n_contexts)

    @property
    def count(self) -> int:
        """Return the count of documents: `numbers` gives those below it."""
        return len(self.starts) or self.n_contexts

    def positions(self, contexts: range) -> Int64[np.ndarray, "B T"]:
        """Return where each token of the contexts lies in the stream;
        what stands before a context's own has its first's."""
        first = np.arange(contexts.start, contexts.stop, dtype=np.int64)[:, None] * self.stride
        within = np.arange(self.context) - (self.context - self.stride)
        return first + np.maximum(within, 0)

    def numbers(self, contexts: range) -> Int64[np.ndarray, "B T"]:
        """Return the document number of each token of the contexts."""
        if not len(self.starts):
            numbers = np.arange(contexts.start, contexts.stop, dtype=np.int64)
            return np.repeat(numbers[:, None], self.context, axis=1)
        return np.searchsorted(self.starts, self.positions(contexts), side="right").astype(np.int64) - 1
