"""python -m pytest tests/harvest/test_buffer.py"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from data.storage.base import LeaseLost
from harvest.buffer import ActivationBuffer, Writer, native
from harvest.units import Unit

KEPT = torch.tensor([1, 2, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_taken_in_the_dtype_of_storage(dtype: torch.dtype) -> None:
    buffer, x_BTD = ActivationBuffer(8, dtype), torch.randn(2, 3, 4)
    buffer.begin()
    buffer.append("a", 0, x_BTD, KEPT)
    buffer.append("a", 3, -9 * x_BTD.transpose(0, 1), KEPT[:1])
    buffer.append("a", 4, x_BTD, KEPT[:0])
    buffer.wait()
    flat, turned = x_BTD.reshape(6, 4), x_BTD.transpose(0, 1).reshape(6, 4)
    wanted = torch.cat([flat[KEPT], -9 * turned[KEPT[:1]]]).to(dtype)
    assert torch.equal(buffer.rows("a", 4), wanted)
    assert buffer.max_abs("a") == float(wanted.abs().max())
    bits = native(buffer.rows("a", 4))
    assert bits.dtype == (np.uint16 if dtype is torch.bfloat16 else np.dtype(str(dtype)[6:]))
    assert bits.tobytes() == wanted.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_the_peak_of_its_unit_only(odd: float) -> None:
    buffer, x_BTD = ActivationBuffer(9, torch.float32), torch.ones(2, 3, 4)
    for value in (odd, 2.0):
        buffer.begin()
        x_BTD[0, 1, 3] = value
        for at, x in enumerate((torch.zeros_like(x_BTD), x_BTD, torch.zeros_like(x_BTD))):
            buffer.append("a", 3 * at, x, KEPT)
        np.testing.assert_equal(buffer.max_abs("a"), abs(value))
    buffer.begin()
    assert buffer.max_abs("a") == 0.0


def test_room_is_made_once() -> None:
    buffer = ActivationBuffer(6, torch.float32)
    places = set()
    for _ in range(3):
        buffer.begin()
        buffer.append("a", 0, torch.randn(2, 3, 4), KEPT)
        places.add(buffer.rows("a", 3).data_ptr())
    assert len(places) == 1


def unit(index: int) -> Unit:
    return Unit("train", index, slice(0, 1), 1, (), ())


def write_all(n: int, write: Any) -> tuple[list[tuple[int, bool]], list[str]]:
    """Hand over n units; (what ended, claims given up)."""
    ended: list[tuple[int, bool]] = []
    given_up: list[str] = []
    with Writer(write, lambda unit, mine: ended.append((unit.index, mine)), 1, torch.float32) as writer:
        for index in range(n):
            buffer, claim = writer.next_buffer(), ExitStack()
            claim.callback(given_up.append, str(index))
            writer.submit(unit(index), buffer, claim)
        writer.finish()
    return ended, given_up


def test_units_are_written_in_order_by_another_thread_into_two_rooms() -> None:
    rooms, threads = [], set()

    def write(unit: Unit, buffer: ActivationBuffer) -> None:
        rooms.append(buffer)
        threads.add(threading.get_ident())
        time.sleep(0.002)

    assert write_all(5, write) == ([(i, True) for i in range(5)], list("01234"))
    assert rooms[0] is rooms[2] is rooms[4] is not rooms[1] is rooms[3]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_a_unit_lost_to_another_process_is_told() -> None:
    def write(unit: Unit, buffer: ActivationBuffer) -> None:
        if unit.index == 1:
            raise LeaseLost

    assert write_all(3, write) == ([(0, True), (1, False), (2, True)], list("012"))


def test_after_a_failure_nothing_more_is_written_and_claims_are_given_up() -> None:
    written, given_up = [], []

    def write(unit: Unit, buffer: ActivationBuffer) -> None:
        written.append(unit.index)
        if unit.index == 1:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"), Writer(write, lambda *_: None, 1, torch.float32) as writer:
        for index in range(4):
            claim = ExitStack()
            claim.callback(given_up.append, index)
            writer.submit(unit(index), writer.next_buffer(), claim)
    assert written == [0, 1] and given_up == [0, 1, 2]
