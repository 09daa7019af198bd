"""What each latent fires on, gathered in one pass over held-out text; memory grows with the latents, not the text
(the firings that co-activation is counted on have a limit of their own).

Letters: B contexts of a chunk, T tokens of a context, N kept tokens of the chunk, F latents, n firings (a latent above
0 on a token), m examples, K places of a shelf, W tokens of a window, P parts of a context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from evaluate.features.coactivation import CoActivation
from evaluate.features.draw import priority

BINS = 64  # of a latent's histogram: equal bins from 0 to the power of two above its maximum
NEVER = -200  # below the exponent of every float32
GATHERED = 1 << 22  # activations of windows looked up at a time
PARTS = 16  # of a context, as equal as they can be, in which firings are counted


@dataclass(frozen=True)
class Firings:
    """All firings of a chunk by latent, then by token: latent, row among the kept tokens, activation."""

    latent_n: NDArray[np.int64]
    row_n: NDArray[np.int64]
    value_n: NDArray[np.float32]

    @classmethod
    def of(cls, f_FN: NDArray[np.float32]) -> Firings:
        latent_n, row_n = np.nonzero(f_FN > 0)
        return cls(latent_n, row_n, f_FN[latent_n, row_n])


@dataclass(frozen=True)
class ContextGroups:
    """The firings of a chunk cut into groups of one latent in one context, which stand together.

    starts, ends: of each group among the firings, its end left out.
    """

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, firings: Firings, sequence_N: NDArray[np.int64]) -> ContextGroups:
        contexts = int(sequence_N[-1]) + 1 if len(sequence_N) else 1
        group_n = firings.latent_n * contexts + sequence_N[firings.row_n]
        starts = np.flatnonzero(np.diff(group_n, prepend=-1))
        return cls(starts, np.append(starts[1:], len(group_n)).astype(np.int64))

    def around(self, firings: Firings, index_m: NDArray[np.int64], position_N: NDArray[np.int64]) -> NDArray[Any]:
        """Return for each firing chosen all firings of its latent in its context: (positions, activations)."""
        out = np.empty(len(index_m), object)
        for place, group in enumerate(np.searchsorted(self.starts, index_m, side="right") - 1):
            own = slice(self.starts[group], self.ends[group])
            out[place] = (position_N[firings.row_n[own]].astype(np.int32), firings.value_n[own].copy())
        return out


class Shelf:
    """For each latent the K examples with the largest keys, in falling order; of equal keys the earlier token's.

    key_FK is -inf where there is none; sequence, position: the token; value: its activation; window_FKW: the latent's
    activations on the tokens around it (0 where there is no token); whole_FK: where it fires in the whole context, as
    (positions, activations), 0 where there is no example.
    """

    def __init__(self, width: int, places: int, window: int) -> None:
        self.key_FK = np.full((width, places), -np.inf)
        self.sequence_FK = np.full((width, places), -1, np.int64)
        self.position_FK = np.full((width, places), -1, np.int64)
        self.value_FK = np.zeros((width, places), np.float32)
        self.window_FKW = np.zeros((width, places, window), np.float32)
        self.whole_FK = np.zeros((width, places), object)

    @property
    def places(self) -> int:
        return self.key_FK.shape[1]

    def candidates(self, latent_n: NDArray[np.int64], key_n: NDArray[np.float64]) -> NDArray[np.int64]:
        """Choose which examples, given by latent and token, can stay: by latent, best first, K a latent at most."""
        # The last place has the smallest key of the shelf: most firings of a long text do not come near it and end
        # here.
        index_m = np.flatnonzero(key_n > self.key_FK[latent_n, -1])
        index_m = index_m[np.lexsort((-key_n[index_m], latent_n[index_m]))]
        return index_m[_rank(latent_n[index_m]) < self.places]

    def put(
        self,
        latent_m: NDArray[np.int64],
        key_m: NDArray[np.float64],
        sequence_m: NDArray[np.int64],
        position_m: NDArray[np.int64],
        value_m: NDArray[np.float32],
        window_mW: NDArray[np.float32],
        whole_m: NDArray[Any],
    ) -> None:
        """Take in what `candidates` chose."""
        if not len(latent_m):
            return
        touched, place_m = np.unique(latent_m, return_inverse=True)
        at = (place_m, self.places + _rank(latent_m))
        tables: tuple[NDArray[Any], ...] = (
            self.key_FK,
            self.sequence_FK,
            self.position_FK,
            self.value_FK,
            self.window_FKW,
            self.whole_FK,
        )
        news: list[NDArray[Any]] = [key_m, sequence_m, position_m, value_m, window_mW, whole_m]
        order: NDArray[np.int64] | None = None
        for table, new in zip(tables, news, strict=True):
            both = np.concatenate([table[touched], np.full_like(table[touched], -np.inf if order is None else 0)], 1)
            both[at] = new
            if order is None:  # the keys are the first table
                # Stable, and what was there comes before what is new: of equal keys the earlier token's stays.
                order = np.argsort(-both, axis=1, kind="stable")[:, : self.places]
            table[touched] = both[np.arange(len(touched))[:, None], order]


def _rank(latent_m: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rank each entry among those of its latent, of latents in groups."""
    starts = np.flatnonzero(np.diff(latent_m, prepend=-1))
    sizes = np.diff(starts, append=len(latent_m))
    return np.arange(len(latent_m)) - np.repeat(starts, sizes)


class Collector:
    """The statistics of F latents and their examples.

    fired_F: tokens on which a latent fires. contexts_F: contexts in which it does. total_F, largest_F: sum and maximum
    of its activations. top: the contexts with the largest activations, each at its largest token. sample: firings
    drawn fairly, as many of each latent. fired_FP: tokens on which a latent fires in each part of a context, of the
    tokens_P there are. together: which latents fire on the same tokens.
    """

    def __init__(self, width: int, *, top: int, sample: int, before: int, after: int, seed: int) -> None:
        self.width, self.seed = width, seed
        self.offsets_W = np.arange(-before, after + 1)
        self.fired_F = np.zeros(width, np.int64)
        self.contexts_F = np.zeros(width, np.int64)
        self.total_F = np.zeros(width)
        self.largest_F = np.zeros(width, np.float32)
        self.top, self.sample = (Shelf(width, places, before + 1 + after) for places in (top, sample))
        self.fired_FP = np.zeros((width, PARTS), np.int64)
        self.tokens_P = np.zeros(PARTS, np.int64)
        self.together = CoActivation(width, seed)
        self.tokens = 0
        self._exponent_F = np.full(width, NEVER)
        self._histogram_FH = np.zeros((width, BINS), np.int64)

    def update(self, f_NF: Float[Tensor, "N F"], keep_BT: Bool[Tensor, "B T"], first: int) -> None:
        """Add the contexts number `first` and those after it, whose kept tokens have the activations `f_NF`."""
        keep = keep_BT.cpu().numpy()
        f_FN = f_NF.detach().t().contiguous().float().cpu().numpy()
        assert f_FN.shape == (self.width, keep.sum())
        self.tokens += f_FN.shape[1]
        firings = Firings.of(f_FN)
        self._count(firings)
        sequence_N, position_N = np.nonzero(keep)
        row_BT = np.where(keep, np.cumsum(keep).reshape(keep.shape) - 1, -1)
        groups = ContextGroups.of(firings, sequence_N)
        peaks = self._peaks(firings, groups)
        token_N = (first + sequence_N) * keep.shape[1] + position_N
        drawn = priority(token_N[firings.row_n], firings.latent_n, self.width, self.seed)
        self.together.update(token_N, firings.row_n, firings.latent_n)
        self._count_parts(firings, position_N, keep.shape[1])
        every = np.arange(len(firings.latent_n))
        for shelf, among, key in (
            (self.top, peaks, firings.value_n[peaks].astype(np.float64)),
            (self.sample, every, drawn),
        ):
            chosen = shelf.candidates(firings.latent_n[among], key)
            index = among[chosen]
            latent, row = firings.latent_n[index], firings.row_n[index]
            windows = self._windows(f_FN, row_BT, latent, sequence_N[row], position_N[row])
            whole = groups.around(firings, index, position_N)
            at = (first + sequence_N[row], position_N[row])
            shelf.put(latent, key[chosen], *at, firings.value_n[index], windows, whole)

    def _count_parts(self, firings: Firings, position_N: NDArray[np.int64], context: int) -> None:
        part_N = position_N * PARTS // context
        self.tokens_P += np.bincount(part_N, minlength=PARTS)
        cells_n = firings.latent_n * PARTS + part_N[firings.row_n]
        self.fired_FP += np.bincount(cells_n, minlength=self.width * PARTS).reshape(-1, PARTS)

    def _count(self, firings: Firings) -> None:
        latent, value = firings.latent_n, firings.value_n
        self.fired_F += np.bincount(latent, minlength=self.width)
        self.total_F += np.bincount(latent, weights=value.astype(np.float64), minlength=self.width)
        np.maximum.at(self.largest_F, latent, value)
        # Bins end at powers of two, so a larger maximum merges pairs of bins and no count is ever split.
        exponent_F = np.where(self.largest_F > 0, np.frexp(self.largest_F)[1], NEVER)
        for _ in range(int(np.log2(BINS)) + 1):
            wider = (exponent_F > self._exponent_F) & (self._exponent_F > NEVER)
            if not wider.any():
                break
            merged = self._histogram_FH[wider].reshape(-1, BINS // 2, 2).sum(2)
            self._histogram_FH[wider] = np.concatenate([merged, np.zeros_like(merged)], 1)
            self._exponent_F[wider] += 1
        self._exponent_F = exponent_F
        bins = np.floor(np.ldexp(value.astype(np.float64), int(np.log2(BINS)) - exponent_F[latent])).astype(np.int64)
        self._histogram_FH += np.bincount(latent * BINS + bins, minlength=self.width * BINS).reshape(-1, BINS)

    def _peaks(self, firings: Firings, groups: ContextGroups) -> NDArray[np.int64]:
        """Find for each latent in each context the first of its largest firings; counts the contexts."""
        if not len(firings.latent_n):
            return np.zeros(0, np.int64)
        number_n = np.repeat(np.arange(len(groups.starts)), groups.ends - groups.starts)
        is_peak = firings.value_n == np.maximum.reduceat(firings.value_n, groups.starts)[number_n]
        peaks: NDArray[np.int64] = np.flatnonzero(is_peak)
        peaks = peaks[np.flatnonzero(np.diff(number_n[peaks], prepend=-1))]
        self.contexts_F += np.bincount(firings.latent_n[peaks], minlength=self.width)
        return peaks

    def _windows(
        self,
        f_FN: NDArray[np.float32],
        row_BT: NDArray[np.int64],
        latent_m: NDArray[np.int64],
        sequence_m: NDArray[np.int64],
        position_m: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Cut out the activations [m, W] on the tokens around each example."""
        out = np.zeros((len(latent_m), len(self.offsets_W)), np.float32)
        step = max(1, GATHERED // len(self.offsets_W))
        for at in range(0, len(latent_m), step):
            part = slice(at, at + step)
            position = position_m[part, None] + self.offsets_W
            inside = (position >= 0) & (position < row_BT.shape[1])
            row = row_BT[sequence_m[part, None], np.where(inside, position, 0)]
            out[part] = np.where(inside & (row >= 0), f_FN[latent_m[part, None], row], 0)
        return out

    def histogram(self, latent: int) -> tuple[list[int], float]:
        """Count firings in equal bins from 0 as far as the maximum's, and the width of a bin;
        nothing of a silent latent."""
        if not self.fired_F[latent]:
            return [], 0.0
        counts = self._histogram_FH[latent]
        return counts[: int(np.flatnonzero(counts)[-1]) + 1].tolist(), float(2.0 ** self._exponent_F[latent] / BINS)

    def interest_F(self) -> NDArray[np.float64]:
        """Compute log10(1 / density) * (1 - mean / max) * min(1, contexts / 8):
        rare, peaked, and met in eight contexts.

        0 for a silent latent; mean and max are of the activations above 0.
        """
        fired = np.maximum(self.fired_F, 1)
        peaked = 1 - self.total_F / fired / np.maximum(self.largest_F, np.finfo(np.float32).tiny)
        score = np.log10(max(self.tokens, 1) / fired) * peaked * np.minimum(1, self.contexts_F / ENOUGH_CONTEXTS)
        return np.where(self.fired_F > 0, np.maximum(score, 0), 0)


ENOUGH_CONTEXTS = 8  # of `interest_F`
