"""Which latents fire on the same tokens, counted on a fair draw of the tokens that memory has room for.

Letters: N tokens of a chunk, n firings (a latent above 0 on a token), F latents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluate.features.draw import priority

MOST_FIRINGS = 1 << 23  # 128 MB as two int64 a firing


class CoActivation:
    """The firings of the tokens drawn. A token is drawn where its own fair number lies below `share`.

    share: 1 until the firings pass `most`, then halved as often as it takes.
    """

    def __init__(self, width: int, seed: int, most: int = MOST_FIRINGS) -> None:
        self.width, self.seed, self.most, self.share = width, seed, most, 1.0
        self._token_n = np.zeros(0, np.int64)
        self._latent_n = np.zeros(0, np.int64)

    def update(self, token_N: NDArray[np.int64], row_n: NDArray[np.int64], latent_n: NDArray[np.int64]) -> None:
        """Add the firings of a chunk: of latent `latent_n` on the token `token_N[row_n]`."""
        drawn = self._drawn(token_N)[row_n]
        self._token_n = np.concatenate([self._token_n, token_N[row_n[drawn]]])
        self._latent_n = np.concatenate([self._latent_n, latent_n[drawn]])
        while len(self._token_n) > self.most:
            self.share /= 2
            drawn = self._drawn(self._token_n)
            self._token_n, self._latent_n = self._token_n[drawn], self._latent_n[drawn]

    def _drawn(self, token_n: NDArray[np.int64]) -> NDArray[np.bool_]:
        # Another seed than the examples', whose draw must not decide this one.
        return priority(token_n, np.zeros_like(token_n), 1, self.seed + 1) < self.share

    def neighbours(self, count: int) -> list[list[tuple[int, float]]]:
        """Find for each latent the `count` others that fire on its tokens most: (latent, share), largest share first.

        The share is of the drawn tokens on which both fire, of those on which either does (Jaccard).
        """
        order = np.argsort(self._token_n, kind="stable")
        token_n, latent_n = self._token_n[order], self._latent_n[order]
        first_n = np.searchsorted(token_n, token_n, side="left")
        last_n = np.searchsorted(token_n, token_n, side="right")
        fired_F = np.bincount(latent_n, minlength=self.width)
        by_latent = np.argsort(latent_n, kind="stable")
        ends_F = np.cumsum(fired_F)
        result: list[list[tuple[int, float]]] = []
        for latent in range(self.width):
            own = by_latent[ends_F[latent] - fired_F[latent] : ends_F[latent]]
            sizes = last_n[own] - first_n[own]
            # All firings of the tokens on which it fires: from first_n on, `sizes` of each.
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            both_F = np.bincount(latent_n[np.repeat(first_n[own], sizes) + within], minlength=self.width)
            both_F[latent] = 0
            share_F = both_F / np.maximum(fired_F + fired_F[latent] - both_F, 1)
            nearest = np.argsort(-share_F, kind="stable")[:count]
            result.append([(int(other), float(share_F[other])) for other in nearest if share_F[other] > 0])
        return result
