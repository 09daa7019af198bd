"""Interpolated n-gram baselines for the language model's card.

p(c | a, b) = l0/V + l1 p1(c) + l2 p2(c | b) + l3 p3(c | a, b), with maximum-likelihood p_n and weights l fitted by
expectation-maximisation on training files that the counts did not see (Jelinek and Mercer, 1980).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


class _Counts:
    """Conditional frequencies of one order: how often the last token of an n-gram follows the n-1 before it."""

    def __init__(self, tokens: Tokens, order: int, vocab: int) -> None:
        self.order, self.vocab = order, vocab
        grams = _keys(tokens, order, vocab)
        self.grams, self.n = np.unique(grams, return_counts=True)
        self.contexts, self.m = np.unique(grams // vocab, return_counts=True)

    def probability(self, tokens: Tokens) -> NDArray[np.float64]:
        """Compute p(token | the order-1 tokens before it) at each n-gram of `tokens`,
        0 where its context was never seen."""
        keys = _keys(tokens, self.order, self.vocab)
        n = _look_up(self.grams, self.n, keys)
        m = _look_up(self.contexts, self.m, keys // self.vocab)
        return n / np.maximum(m, 1)


def _keys(tokens: Tokens, order: int, vocab: int) -> Tokens:
    key = np.zeros(len(tokens) - order + 1, np.int64)
    for i in range(order):
        key = key * vocab + tokens[i : len(tokens) - order + 1 + i]
    return key


def _look_up(keys: Tokens, values: Tokens, wanted: Tokens) -> NDArray[np.float64]:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0).astype(np.float64)


class NGram:
    """An interpolated n-gram model of the given order, 1 to 3.

    Args:
        counted: token stream that the frequencies are read off.
        fitted: another stream of training text, on which the interpolation weights are fitted.
        order: 1 for unigram, 2 for bigram, 3 for trigram.
        vocab: number of token types.
    """

    def __init__(self, counted: Tokens, fitted: Tokens, order: int, vocab: int, steps: int = 50) -> None:
        self.order, self.vocab = order, vocab
        self.counts = [_Counts(counted, n, vocab) for n in range(1, order + 1)]
        parts = self._parts(fitted)
        self.weights = np.full(order + 1, 1 / (order + 1))
        for _ in range(steps):
            share = parts * self.weights
            self.weights = (share / share.sum(1, keepdims=True)).mean(0)

    def _parts(self, tokens: Tokens) -> NDArray[np.float64]:
        uniform = np.full(len(tokens) - self.order + 1, 1 / self.vocab)
        orders = [c.probability(tokens[self.order - c.order :]) for c in self.counts]
        return np.stack([uniform, *orders], 1)

    def nats(self, tokens: Tokens) -> NDArray[np.float64]:
        """Compute the cross-entropy in nats of every token but the first `order - 1`."""
        probability: NDArray[np.float64] = self._parts(tokens) @ self.weights
        return -np.log(probability)
