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
from evaluate.feature_metrics.bases import BasisReader
from evaluate.inputs import ContextBatch, HeldoutText
from harvest.packing import PackedTokens


@dataclass(frozen=True)
class FeatureText:
    """The held-out text and what reads it at a site; `bos` is put before a text that is cut out of its context."""

    heldout: HeldoutText
    reader: BasisReader
    bos: int | None

    @property
    def packed(self) -> PackedTokens:
        """Return the contexts."""
        return self.heldout.packed

    @property
    def tokenizer(self) -> Any:
        """Return the tokenizer that the text was packed with."""
        return self.heldout.tokenizer

    def half(self, second: bool) -> range:
        """Return the numbers of the contexts of a half; UserError where the text has too few for two."""
        sequences = len(self.packed.contexts)
        if sequences < 4:
            raise UserError(
                f"feature_metrics take two halves of the contexts and there are {sequences}: score more tokens"
            )
        return range(sequences // 2, sequences) if second else range(sequences // 2)

    def batches(self, contexts: range) -> Iterator[ContextBatch]:
        """Give contexts in the batches that the LM reads at once."""
        return self.heldout.batches(contexts)


@dataclass(frozen=True)
class Sample:
    """M scored tokens of a half, in order: where they are, their document, and what the bases read there.

    reads: {False: the site's rows [M, D], True: the MLP's neurons [M, H]}.
    """

    sequence_M: NDArray[np.int64]
    position_M: NDArray[np.int64]
    document_M: NDArray[np.int64]
    reads: dict[bool, Tensor]


def draw(keep_ST: NDArray[np.bool_], contexts: range, tokens: int, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Draw sequence and position of at most `tokens` kept tokens of the contexts, without replacement, in order.

    A count for each context first, then places within it, so that no list of all tokens is text.
    """
    rng = np.random.default_rng([seed, contexts.start])
    counts = keep_ST[contexts.start : contexts.stop].sum(1, dtype=np.int64)
    shares = rng.multivariate_hypergeometric(counts, min(tokens, int(counts.sum())), method="marginals")
    sequences, positions = [], []
    for sequence, share in zip(contexts, shares, strict=True):
        scored = np.flatnonzero(keep_ST[sequence])
        positions.append(np.sort(rng.choice(scored, share, replace=False)))
        sequences.append(np.full(share, sequence))
    return np.concatenate(sequences), np.concatenate(positions)


def take(text: FeatureText, contexts: range, tokens: int, seed: int, on_progress: Callable[[int], Any]) -> Sample:
    """Take a sample of the contexts; `on_progress` is called with how many contexts were read."""
    sequence_M, position_M = draw(text.packed.keep, contexts, tokens, seed)
    parts: dict[bool, list[Tensor]] = {}
    for batch in text.batches(contexts):
        some = batch.numbers
        low, high = np.searchsorted(sequence_M, [some.start, some.stop])
        reads = text.reader.read(batch.ids_BT)
        rows, columns = torch.from_numpy(sequence_M[low:high] - some.start), torch.from_numpy(position_M[low:high])
        for name, x_BTX in reads.items():
            parts.setdefault(name, []).append(x_BTX[rows, columns].clone())
        on_progress(len(some))
    document_ST = text.heldout.documents.numbers(contexts)
    document_M = document_ST[sequence_M - contexts.start, position_M]
    return Sample(sequence_M, position_M, document_M, {name: torch.cat(x) for name, x in parts.items()})
