"""The schedules against values worked by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.schedules import Schedule, ramp


def test_ten_steps_by_hand() -> None:
    schedule = Schedule(total=10, lr_warmup=4, lr_decay=5, sparsity_warmup=2)
    factors = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [schedule.lr(step) for step in range(10)] == pytest.approx(factors)
    assert schedule.lr(10) == 0
    assert [schedule.sparsity(step) for step in range(3)] == [0.5, 1, 1]


def test_without_warm_ups_every_step_is_full() -> None:
    schedule = Schedule.of_shares(10, 0, 0, 0)
    assert {schedule.lr(step) for step in range(10)} == {schedule.sparsity(step) for step in range(10)} == {1.0}


def test_a_coefficient_settles_over_175_steps_after_its_warm_up_or_half_of_the_run() -> None:
    long, short = Schedule.of_shares(1000, 0, 0, 0.1), Schedule.of_shares(10, 0, 0, 0.2)
    assert [long.settled(step) for step in (0, 99, 100, 186, 274, 999)] == pytest.approx(
        [0, 0, 1 / 175, 87 / 175, 1, 1]
    )
    assert [short.settled(step) for step in range(8)] == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1])


def test_shares_become_steps() -> None:
    assert Schedule.of_shares(200, 0.05, 0.2, 0.1) == Schedule(200, 10, 40, 20)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_no_step_of_the_run_is_lost(total: int, warmup: float, decay: float) -> None:
    schedule = Schedule.of_shares(total, warmup, decay, warmup)
    assert all(0 < schedule.lr(step) <= 1 for step in range(total))
    assert all(0 < ramp(step, total) <= 1 for step in range(total))
    assert ramp(total - 1, total) == 1
