"""The tokens that the feature metrics look at: two halves of the held-out contexts, and a sample of each.

What is chosen (a probe's latent, a pattern) is chosen on the first half and scored on the second. Letters: S contexts,
T tokens of a context, M tokens of a sample, D width of the site, H neurons, F units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.base.errors import UserError
from evaluate.feature_metrics.bases import Reader
from harvest.packing import PackedTokens

Say = Callable[[str], None]


@dataclass(frozen=True)
class FeatureText:
    """The held-out text, what reads it, and how many contexts the LM takes at a time."""

    packed: PackedTokens
    tokenizer: Any
    reader: Reader
    lm_batch: int
    bos: int | None  # put before a text that is cut out of its context

    def half(self, second: bool) -> range:
        """The numbers of the contexts of a half; UserError where the text has too few for two."""
        sequences = len(self.packed.contexts)
        if sequences < 4:
            raise UserError(f"gao takes two halves of the contexts and there are {sequences}: score more tokens")
        return range(sequences // 2, sequences) if second else range(sequences // 2)

    def batches(self, contexts: range) -> Iterator[tuple[range, Tensor, Tensor]]:
        """(numbers, ids [B, T], keep [B, T]) of contexts."""
        device = next(self.reader.model.parameters()).device
        for first in range(contexts.start, contexts.stop, self.lm_batch):
            some = range(first, min(first + self.lm_batch, contexts.stop))
            ids = torch.from_numpy(self.packed.contexts[some.start : some.stop]).to(device, torch.int64)
            yield some, ids, torch.from_numpy(self.packed.keep[some.start : some.stop]).to(device)


@dataclass(frozen=True)
class Sample:
    """M kept tokens of a half, in order: where they are and what the bases read there ({False: [M, D], ...})."""

    sequence_M: NDArray[np.int64]
    position_M: NDArray[np.int64]
    reads: dict[bool, Tensor]


def draw(keep_ST: NDArray[np.bool_], contexts: range, tokens: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sequence and position of at most `tokens` kept tokens of the contexts, without replacement, in order.

    A count for each context first, then places within it, so that no list of all tokens is held.
    """
    rng = np.random.default_rng([seed, contexts.start])
    counts = keep_ST[contexts.start : contexts.stop].sum(1, dtype=np.int64)
    shares = rng.multivariate_hypergeometric(counts, min(tokens, int(counts.sum())), method="marginals")
    sequences, positions = [], []
    for sequence, share in zip(contexts, shares, strict=True):
        kept = np.flatnonzero(keep_ST[sequence])
        positions.append(np.sort(rng.choice(kept, share, replace=False)))
        sequences.append(np.full(share, sequence))
    return np.concatenate(sequences), np.concatenate(positions)


def take(held: FeatureText, contexts: range, tokens: int, seed: int, told: Callable[[int], Any]) -> Sample:
    """A sample of the contexts; `told` hears how many contexts were read."""
    sequence_M, position_M = draw(held.packed.keep, contexts, tokens, seed)
    parts: dict[bool, list[Tensor]] = {}
    for some, ids_BT, _ in held.batches(contexts):
        low, high = np.searchsorted(sequence_M, [some.start, some.stop])
        reads = held.reader.read(ids_BT)
        rows, columns = torch.from_numpy(sequence_M[low:high] - some.start), torch.from_numpy(position_M[low:high])
        for name, x_BTX in reads.items():
            parts.setdefault(name, []).append(x_BTX[rows, columns].clone())
        told(len(some))
    return Sample(sequence_M, position_M, {name: torch.cat(found) for name, found in parts.items()})
