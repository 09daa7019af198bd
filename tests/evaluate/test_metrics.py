"""Metrics against worked cases, float64 formulas over the whole set, and known mistakes 9 and 10 of methods.md."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evaluate.metrics import (
    Firing,
    Predictions,
    Reconstruction,
    SetSums,
    pooled,
    resampled,
    scored_positions,
    statistics,
    totals,
)

CE = {"clean": 1.0, "spliced": 1.2, "zero": 3.0, "mean": 2.0, "kl": 0.1}


def table_of(
    x: Tensor, x_hat: Tensor, *, empty: Tensor | None = None, sequence: Tensor | None = None, batch: int | None = None
) -> dict[str, Any]:
    """Reconstruction columns of a whole set, fed `batch` rows at a time."""
    empty = torch.zeros_like(x) if empty is None else empty
    sequence = torch.zeros(len(x), dtype=torch.int64) if sequence is None else sequence
    sums = Reconstruction(torch.full((x.shape[1],), 0.25), int(sequence.max()) + 1)
    for rows in torch.arange(len(x)).split(batch or len(x)):
        sums.update(x[rows], x_hat[rows], empty[rows], sequence[rows])
    return sums.table()


def with_losses(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns completed by made-up losses and L0, so that `statistics` can be taken of them."""
    tokens = columns["tokens"]
    return columns | {name: tokens * value for name, value in CE.items()} | {"predicted": tokens, "l0": tokens * 4}


def values_of(columns: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, (value,) in statistics(totals(with_losses(columns))).items()}


def test_reconstruction_worked_by_hand() -> None:
    # Two tokens of three entries. mean = (2, 1, 0); deviations (-1,-1,0), (1,1,0): total 4. Errors (0,0,1), (0,0,0): 1.
    x = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0]])
    x_hat = torch.tensor([[1.0, 0.0, 1.0], [3.0, 2.0, 0.0]])
    got = values_of(table_of(x, x_hat))
    assert got["nmse"] == pytest.approx(0.25)
    assert got["ev"] == pytest.approx(0.75)
    # cos: 1/sqrt(2) and 1; gamma = (2 + 13) / (1 + 13).
    assert got["cosine"] == pytest.approx((2**-0.5 + 1) / 2)
    assert got["gamma"] == pytest.approx(15 / 14)
    # With b_dec = (0, 0, 1): x - b = (1,0,-1), (3,2,-1); x_hat - b = (1,0,0), (3,2,-1): (1 + 14) / (1 + 14).
    got = values_of(table_of(x, x_hat, empty=torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3)))
    assert got["gamma_c"] == pytest.approx(1.0)
    assert got["gamma"] == pytest.approx(15 / 14)


def test_token_space_worked_by_hand() -> None:
    # x = (0, 0, 3): mean 1, std (ddof 1) sqrt(3); x' = (-1, -1, 2)/sqrt(3). x = (3, 0, 0) likewise.
    x = torch.tensor([[0.0, 0.0, 3.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    x_hat = x + torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    got = values_of(table_of(x, x_hat))
    # Error' = 1/3 on one entry of six. Mean x' = (1/2, -1, 1/2)/sqrt(3), deviations (-1.5, 0, 1.5)/sqrt(3): 2 * 1.5.
    assert got["nmse_btk"] == pytest.approx(1 / 3 / 6, rel=1e-4)
    assert got["nmse_token"] == pytest.approx(1 / 3 / 3, rel=1e-4)


def test_reconstruction_equals_the_formulas_over_the_whole_set() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=g) * torch.linspace(0.1, 9, 12) + 50  # a large constant part, uneven channels
    x_hat, empty = x + torch.randn(200, 12, generator=g), torch.randn(12, generator=g).expand(200, 12)
    got = values_of(table_of(x, x_hat, empty=empty, sequence=torch.arange(200) % 7))
    x, x_hat, empty = x.double(), x_hat.double(), empty.double()
    assert got["nmse"] == pytest.approx(float(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()), rel=1e-10)
    mean, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    xn, xn_hat = (x - mean) / scale, (x_hat - mean) / scale
    assert got["nmse_token"] == pytest.approx(
        float(((xn - xn_hat) ** 2).sum() / ((xn - xn.mean(0)) ** 2).sum()), rel=1e-10
    )
    assert got["nmse_btk"] == pytest.approx(float(((xn - xn_hat) ** 2).mean()), rel=1e-10)
    assert got["cosine"] == pytest.approx(float(torch.cosine_similarity(x, x_hat, dim=1).mean()), rel=1e-10)
    assert got["gamma"] == pytest.approx(float((x_hat**2).sum() / (x_hat * x).sum()), rel=1e-10)
    c, c_hat = x - empty, x_hat - empty
    assert got["gamma_c"] == pytest.approx(float((c_hat**2).sum() / (c_hat * c).sum()), rel=1e-10)


@given(rows=st.integers(2, 40), batch=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_streaming_equals_the_whole_set(rows: int, batch: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, x_hat = torch.randn(rows, 5, generator=g), torch.randn(rows, 5, generator=g)
    sequence = torch.randint(0, 4, (rows,), generator=g)
    whole = table_of(x, x_hat, sequence=sequence)
    parts = table_of(x, x_hat, sequence=sequence, batch=batch)
    for name, column in whole.items():
        np.testing.assert_allclose(parts[name], column, rtol=1e-11, atol=1e-11, err_msg=name)


def test_a_constant_error_is_not_hidden_and_ratios_are_not_averaged() -> None:
    """Known mistake 9: centring the residual hides a constant error; a mean of ratios is another number."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    x[:32] *= 10
    nmse = values_of(table_of(x, x + 3))["nmse"]
    variance = float((x.double() - x.double().mean(0)).square().sum())
    assert nmse == pytest.approx(64 * 6 * 9 / variance, rel=1e-6)
    x_hat = x + torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
    streamed = values_of(table_of(x, x_hat, batch=32))["nmse"]
    halves = [values_of(table_of(x[h], x_hat[h]))["nmse"] for h in (slice(0, 32), slice(32, 64))]
    assert streamed == pytest.approx(values_of(table_of(x, x_hat))["nmse"], rel=1e-10)
    assert abs(streamed - sum(halves) / 2) > 0.1 * streamed


def test_the_mean_as_reconstruction_has_nmse_one_and_half_of_x_shrinks() -> None:
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 2
    assert values_of(table_of(x, x.mean(0).expand(100, 4)))["nmse"] == pytest.approx(1, rel=1e-12)
    half = values_of(table_of(x, x / 2))
    assert half["gamma"] == pytest.approx(0.5) and half["cosine"] == pytest.approx(1)
    nothing = values_of(table_of(x, x * 0))
    assert nothing["cosine"] == 0 and np.isnan(nothing["gamma"])


def test_firing_worked_by_hand() -> None:
    firing = Firing(width=3, context=2, n_contexts=2)
    f = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 0.0]])
    firing.update(f[:2], torch.tensor([0, 0]), torch.tensor([0, 1]))
    firing.update(f[2:], torch.tensor([1]), torch.tensor([1]))
    got = firing.result()
    assert got["histogram"] == [1, 1, 1]
    assert got["fired"] == [2, 1, 0] and got["silent"] == 1
    assert got["by_position"] == [1.0, 1.0]
    assert got["std"] == pytest.approx(np.std([1, 2, 0]))
    assert firing.sums.of_contexts["l0"].tolist() == [3, 0]


def test_a_position_without_tokens_has_no_l0() -> None:
    firing = Firing(width=2, context=3, n_contexts=1)
    firing.update(torch.ones(2, 2), torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert firing.result()["by_position"] == [None, 2.0, 2.0]


def test_cross_entropy_and_kl_against_float64() -> None:
    g = torch.Generator().manual_seed(4)
    ids, logits, other = torch.randint(0, 9, (3, 5), generator=g), torch.randn(3, 5, 9, generator=g) * 4, None
    other = logits + torch.randn(3, 5, 9, generator=g)
    keep = torch.rand(3, 5, generator=g) > 0.3
    scored = scored_positions(keep)
    a, b = Predictions.of(logits, ids, scored), Predictions.of(other, ids, scored)
    ce, kl = [], []
    for row in range(3):
        for t in range(4):
            if keep[row, t + 1]:  # token t+1 is of the set
                p, q = logits[row, t].double().softmax(0), other[row, t].double().softmax(0)
                ce.append(-float(p[ids[row, t + 1]].log()))
                kl.append(float((p * (p / q).log()).sum()))
    np.testing.assert_allclose(a.ce_P.numpy(), ce, rtol=1e-5)
    np.testing.assert_allclose(a.kl_to(b).numpy(), kl, rtol=1e-4, atol=1e-6)
    assert a.kl_to(a).abs().max() == 0


def test_kl_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(5)
    ids, scored = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 7, dtype=torch.bool)
    a, b = (Predictions.of(torch.randn(2, 8, 6, generator=g), ids, scored) for _ in range(2))
    whole = a.kl_to(b)
    monkeypatch.setattr("evaluate.metrics.LOGITS_AT_ONCE", 20)
    assert torch.equal(a.kl_to(b), whole)


def test_half_precision_logits_are_widened_first() -> None:
    logits = (torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(6)) * 5).bfloat16()
    ids, scored = torch.tensor([[0, 1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    expected = -logits[0, :2].double().log_softmax(-1)[[0, 1], [1, 2]]
    torch.testing.assert_close(Predictions.of(logits, ids, scored).ce_P.double(), expected, rtol=1e-5, atol=1e-6)


def test_recovered_is_the_right_way_round_and_of_pooled_means() -> None:
    """Known mistake 10: (zero - spliced)/(zero - clean), not its inverse; of pooled means, not a mean of ratios."""
    columns = {name: np.array([1.0, 1.0]) for name in values_table()}
    columns |= {
        "predicted": np.array([1.0, 3.0]),
        "clean": np.array([1.0, 6.0]),
        "spliced": np.array([2.0, 6.3]),
        "zero": np.array([5.0, 30.0]),
        "mean": np.array([3.0, 7.5]),
    }
    got = statistics(totals(columns))
    assert got["recovered_zero"] == pytest.approx((35 - 8.3) / (35 - 7))
    assert got["recovered_mean"] == pytest.approx((10.5 - 8.3) / (10.5 - 7))
    assert got["ce_increase"] == pytest.approx(8.3 / 4 - 7 / 4)


def values_table() -> dict[str, Any]:
    return with_losses(table_of(torch.randn(4, 3), torch.randn(4, 3)))


def test_bootstrap_error_of_a_mean_is_the_analytic_one() -> None:
    rng = np.random.default_rng(0)
    columns = values_table()
    sequences = 400
    columns = {name: np.ones(sequences) for name in columns} | {"kl": rng.exponential(size=sequences)}
    got = pooled(SetSums(columns, columns), samples=4000, seed=1)["kl"]
    analytic = columns["kl"].std(ddof=0) / np.sqrt(sequences)
    assert got["value"] == pytest.approx(columns["kl"].mean())
    assert got["se"] == pytest.approx(analytic, rel=0.05)  # the error of a standard error from 4,000 samples is 1.1%


def test_bootstrap_error_of_a_ratio_is_the_analytic_one() -> None:
    rng = np.random.default_rng(1)
    sequences = 500
    columns = {name: np.ones(sequences) for name in values_table()}
    columns["deviation"] = rng.gamma(9.0, size=sequences)
    columns["error"] = 0.3 * columns["deviation"] + rng.normal(0, 0.4, size=sequences)
    got = pooled(SetSums(columns, columns), samples=4000, seed=2)["nmse"]
    ratio = columns["error"].sum() / columns["deviation"].sum()
    residual = columns["error"] - ratio * columns["deviation"]  # the delta method
    assert got["value"] == pytest.approx(ratio)
    assert got["se"] == pytest.approx(residual.std() / np.sqrt(sequences) / columns["deviation"].mean(), rel=0.06)


def test_bootstrap_is_paired() -> None:
    """Losses that differ by a constant have an increase without error, however much they vary over sequences."""
    rng = np.random.default_rng(2)
    columns = {name: np.full(50, 10.0) for name in values_table()} | {"clean": rng.normal(30, 5, size=50)}
    columns["spliced"] = columns["clean"] + 2.0
    got = pooled(SetSums(columns, columns), samples=200, seed=0)
    assert got["ce_increase"]["value"] == pytest.approx(0.2)
    assert got["ce_increase"]["se"] == pytest.approx(0, abs=1e-12)
    assert (got["ce_spliced"]["se"] or 0) > 0.05


def test_bootstrap_draws_depend_on_the_seed_alone() -> None:
    columns = {"a": np.arange(20.0), "b": np.arange(20.0) * 3}
    first, again = (resampled(columns, samples=5, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first["a"], again["a"])
    np.testing.assert_allclose(first["b"], 3 * first["a"])
    assert not np.array_equal(first["a"], resampled(columns, samples=5, seed=8)["a"])


def test_one_sequence_has_no_error_and_infinite_values_are_none() -> None:
    columns = {name: np.array([1.0]) for name in values_table()}  # zero = clean: nothing to recover
    got = pooled(SetSums(columns, columns), samples=10, seed=0)
    assert got["ce_clean"] == {"value": 1.0, "se": None}
    assert got["recovered_zero"] == {"value": None, "se": None}
