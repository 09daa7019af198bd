"""The n-gram baselines, by hand and against a dictionary of counts."""

import numpy as np
import pytest

from harvest.embedded.ngram import NGram


def test_bigram_by_hand() -> None:
    """In 0 1 0 1 1 the bigrams are 01 10 01 11: p(1|0) = 1, p(0|1) = 1/2; p(1) = 3/5."""
    model = NGram(np.array([0, 1, 0, 1, 1]), np.array([0, 1, 0]), order=2, vocab=2)
    uniform, one, two = model.weights
    (nats,) = model.nats(np.array([0, 1]))
    assert nats == pytest.approx(-np.log(uniform / 2 + one * 3 / 5 + two * 1.0))
    (nats,) = model.nats(np.array([1, 0]))
    assert nats == pytest.approx(-np.log(uniform / 2 + one * 2 / 5 + two / 2))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_the_next_token_sum_to_one(order: int) -> None:
    rng = np.random.default_rng(order)
    vocab = 5
    # The last token is seen with every context but the longest; a context never seen gives its weight to nobody.
    counted = rng.integers(vocab, size=2000)
    model = NGram(counted, rng.integers(vocab, size=300), order, vocab)
    context = [int(t) for t in counted[: order - 1]]
    total = sum(np.exp(-model.nats(np.array([*context, token]))[0]) for token in range(vocab))
    assert total == pytest.approx(1.0)
    assert model.weights.sum() == pytest.approx(1.0)


def test_structure_is_worth_a_higher_order() -> None:
    """A stream where the two tokens before decide the next: only the trigram knows."""
    rng = np.random.default_rng(0)
    tokens = [0, 1]
    for _ in range(5000):
        tokens.append((tokens[-1] + tokens[-2]) % 7 if rng.random() < 0.9 else int(rng.integers(7)))
    stream = np.array(tokens)
    nats = [float(NGram(stream[:3000], stream[3000:4000], n, 7).nats(stream[4000:]).mean()) for n in (1, 2, 3)]
    assert nats[2] < nats[1] - 0.5
    assert abs(nats[1] - nats[0]) < 0.1
