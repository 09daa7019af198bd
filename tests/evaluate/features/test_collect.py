"""The collector against plain loops over all activations, and its independence of how the text is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from evaluate.features.coactivation import CoActivation
from evaluate.features.collect import BINS, PARTS, Collector
from evaluate.features.draw import priority

CONTEXTS, LENGTH, WIDTH = 9, 14, 11
SETTINGS: dict[str, Any] = {"top": 3, "sample": 5, "before": 2, "after": 1, "seed": 4}


@pytest.fixture(scope="module")
def f_STF() -> NDArray[np.float32]:
    """Activations of every token: latent 0 is silent, 1 fires once, 2 everywhere; many values are equal."""
    rng = np.random.default_rng(0)
    shape = (CONTEXTS, LENGTH, WIDTH)
    f = np.round(np.exp(rng.normal(size=shape) * 3), 1) * (rng.random(shape) < 0.3)
    f[..., 0] = 0
    f[..., 1] = 0
    f[4, 6, 1] = 2.0
    f[..., 2] = 1 + rng.random((CONTEXTS, LENGTH))
    return f.astype(np.float32)


@pytest.fixture(scope="module")
def keep_ST() -> NDArray[np.bool_]:
    keep = np.random.default_rng(1).random((CONTEXTS, LENGTH)) < 0.8
    keep[4, 6] = True
    return keep


def collected(f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_], contexts_at_once: int, **more: Any) -> Collector:
    found = Collector(WIDTH, **{**SETTINGS, **more})
    for first in range(0, CONTEXTS, contexts_at_once):
        keep = keep_ST[first : first + contexts_at_once]
        found.update(torch.from_numpy(f_STF[first : first + contexts_at_once][keep]), torch.from_numpy(keep), first)
    return found


def firings(f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_], latent: int) -> list[tuple[int, int, float]]:
    """(sequence, position, activation) of a latent on kept tokens, in the order of the text."""
    return [
        (s, t, float(f_STF[s, t, latent]))
        for s in range(CONTEXTS)
        for t in range(LENGTH)
        if keep_ST[s, t] and f_STF[s, t, latent] > 0
    ]


def shelf(found: Collector, name: str, latent: int) -> list[tuple[int, int, float]]:
    it = getattr(found, name)
    return [
        (int(it.sequence_FK[latent, k]), int(it.position_FK[latent, k]), float(it.value_FK[latent, k]))
        for k in range(it.places)
        if it.sequence_FK[latent, k] >= 0
    ]


@pytest.mark.parametrize("at_once", [1, 4, 9])
def test_every_figure_is_what_plain_loops_give(
    f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_], at_once: int
) -> None:
    found = collected(f_STF, keep_ST, at_once)
    assert found.tokens == keep_ST.sum()
    for latent in range(WIDTH):
        own = firings(f_STF, keep_ST, latent)
        values = [v for _, _, v in own]
        assert found.fired_F[latent] == len(own)
        assert found.contexts_F[latent] == len({s for s, _, _ in own})
        assert found.total_F[latent] == pytest.approx(sum(values), rel=1e-12)
        assert found.largest_F[latent] == max(values, default=0)
        counts, width = found.histogram(latent)
        if not own:
            assert (counts, width) == ([], 0.0)
            continue
        assert max(values) < width * BINS <= 2 * max(values)
        expected, _ = np.histogram(values, bins=np.arange(BINS + 1) * width)
        assert counts == expected[: len(counts)].tolist() and not expected[len(counts) :].any()
        assert sum(counts) == len(own)


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_the_top_contexts_are_the_largest_one_a_context(
    f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_], at_once: int
) -> None:
    found = collected(f_STF, keep_ST, at_once)
    for latent in range(WIDTH):
        best: dict[int, tuple[int, int, float]] = {}
        for s, t, v in firings(f_STF, keep_ST, latent):
            if s not in best or v > best[s][2]:
                best[s] = (s, t, v)
        expected = sorted(best.values(), key=lambda one: (-one[2], one[0]))[: SETTINGS["top"]]
        assert shelf(found, "top", latent) == expected


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_the_sample_is_that_of_the_priorities(
    f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_], at_once: int
) -> None:
    found = collected(f_STF, keep_ST, at_once)
    for latent in range(WIDTH):
        own = firings(f_STF, keep_ST, latent)
        token = np.array([s * LENGTH + t for s, t, _ in own], np.int64)
        drawn = priority(token, np.full(len(own), latent), WIDTH, SETTINGS["seed"])
        expected = [own[i] for i in np.argsort(-drawn)[: SETTINGS["sample"]]]
        assert shelf(found, "sample", latent) == expected


def test_windows_hold_the_latents_activations_around_each_example(
    f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_]
) -> None:
    found = collected(f_STF, keep_ST, 2)
    for name in ("top", "sample"):
        for latent in range(WIDTH):
            for place, (s, t, _) in enumerate(shelf(found, name, latent)):
                around = range(t - SETTINGS["before"], t + SETTINGS["after"] + 1)
                expected = [f_STF[s, u, latent] if 0 <= u < LENGTH and keep_ST[s, u] else 0.0 for u in around]
                assert getattr(found, name).window_FKW[latent, place].tolist() == expected


def test_another_seed_draws_another_sample_and_the_same_top(
    f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_]
) -> None:
    one, other = collected(f_STF, keep_ST, 3), collected(f_STF, keep_ST, 3, seed=5)
    assert shelf(one, "top", 2) == shelf(other, "top", 2)
    assert set(shelf(one, "sample", 2)) != set(shelf(other, "sample", 2))


def test_the_draw_is_fair() -> None:
    """Each of 40 firings is among the 10 drawn in a quarter of 4,000 latents, within 5 standard deviations."""
    token, latent = np.meshgrid(np.arange(40), np.arange(4000))
    drawn = priority(token.ravel(), latent.ravel(), 4000, 0).reshape(4000, 40)
    assert drawn.min() >= 0 and drawn.max() < 1
    count_40 = (drawn.argsort(1).argsort(1) >= 30).sum(0)
    assert np.abs(count_40 - 1000).max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_memory_does_not_grow_with_the_text(f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_]) -> None:
    def held(found: Collector) -> int:
        parts = [*vars(found).values(), *vars(found.top).values(), *vars(found.sample).values()]
        return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))

    found = collected(f_STF, keep_ST, 3)
    before = held(found)
    for round_ in range(1, 5):
        found.update(torch.from_numpy(f_STF[keep_ST]), torch.from_numpy(keep_ST), round_ * CONTEXTS)
    assert held(found) == before and found.tokens == 5 * keep_ST.sum()


def test_interest_by_hand() -> None:
    """Latent 0 fires in 8 contexts on 8 of 80 tokens, seven times at 1 and once at 9; latent 1 always at 1; 2 never."""
    f = torch.zeros(8, 10, 3)
    f[:, 3, 0] = 1
    f[5, 3, 0] = 9
    f[:, :, 1] = 1
    found = Collector(3, **SETTINGS)
    found.update(f.reshape(80, 3), torch.ones(8, 10, dtype=torch.bool), 0)
    assert found.interest_F().tolist() == pytest.approx([1.0 * (1 - 2 / 9) * 1.0, 0.0, 0.0])


def test_nothing_kept_is_nothing_found() -> None:
    found = Collector(3, **SETTINGS)
    found.update(torch.zeros(0, 3), torch.zeros(2, 4, dtype=torch.bool), 0)
    assert found.tokens == 0 and found.fired_F.sum() == 0 and found.histogram(1) == ([], 0.0)
    assert found.interest_F().tolist() == [0, 0, 0]


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_each_example_has_its_latents_firings_of_the_whole_context(
    f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_], at_once: int
) -> None:
    found = collected(f_STF, keep_ST, at_once)
    for name in ("top", "sample"):
        for latent in range(WIDTH):
            own = firings(f_STF, keep_ST, latent)
            for place, (sequence, _, _) in enumerate(shelf(found, name, latent)):
                positions, values = getattr(found, name).whole_FK[latent, place]
                expected = [(t, v) for s, t, v in own if s == sequence]
                assert list(zip(positions.tolist(), values.tolist(), strict=True)) == expected


def test_firings_are_counted_by_part_of_the_context(f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_]) -> None:
    found = collected(f_STF, keep_ST, 4)
    part_T = np.arange(LENGTH) * PARTS // LENGTH
    for part in range(PARTS):
        there = keep_ST & (part_T == part)
        assert found.tokens_P[part] == there.sum()
        assert found.fired_FP[:, part].tolist() == (f_STF[there] > 0).sum(0).tolist()


@pytest.mark.parametrize("at_once", [1, 9])
def test_co_activation_is_the_share_of_tokens_on_which_both_fire(
    f_STF: NDArray[np.float32], keep_ST: NDArray[np.bool_], at_once: int
) -> None:
    near = collected(f_STF, keep_ST, at_once).together.neighbours(3)
    on_NF = f_STF[keep_ST] > 0
    for latent in range(WIDTH):
        both = (on_NF & on_NF[:, [latent]]).sum(0)
        either = (on_NF | on_NF[:, [latent]]).sum(0)
        share = np.where(np.arange(WIDTH) == latent, 0, both / np.maximum(either, 1))
        expected = sorted(((i, s) for i, s in enumerate(share) if s > 0), key=lambda pair: (-pair[1], pair[0]))[:3]
        assert near[latent] == [(i, pytest.approx(s)) for i, s in expected]


def test_co_activation_keeps_a_fair_draw_of_a_long_text() -> None:
    """Of 4,000 tokens with two firings each, room for 1,000 firings keeps an eighth: both firings of each token."""
    together = CoActivation(2, seed=0, most=1000)
    for first in range(0, 4000, 100):
        token = np.arange(first, first + 100)
        together.update(token, np.repeat(np.arange(100), 2), np.tile([0, 1], 100))
    assert together.share in (1 / 8, 1 / 16)
    assert together.neighbours(1) == [[(1, 1.0)], [(0, 1.0)]]
