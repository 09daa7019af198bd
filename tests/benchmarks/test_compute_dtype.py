"""python -m pytest tests/benchmarks/test_compute_dtype.py"""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import compute_dtype


@pytest.mark.slow
def test_bfloat16_costs_more_than_storing_in_it_and_less_than_a_percent(capsys: pytest.CaptureFixture[str]) -> None:
    compute_dtype.main(["--sites", "resid_post.1", "--contexts", "2", "--rounds", "1"])
    told = capsys.readouterr().out
    assert re.search(r"^bfloat16 is \d+\.\d\d times as fast \(", told, re.M)
    found = re.search(r"^resid_post\.1: NMSE (\S+) of bfloat16 compute, (\S+) of bfloat16 storage alone$", told, re.M)
    assert found
    compute, storage = map(float, found.groups())
    assert 0 < storage < compute < 0.01


def test_the_error_by_hand() -> None:
    # Mean (1, 0), squared deviations 1 + 1; an error of 1 in one entry.
    assert compute_dtype.nmse(torch.tensor([[0.0, 0], [2, 0]]), torch.tensor([[0.0, 1], [2, 0]])) == 0.5
