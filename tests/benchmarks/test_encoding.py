"""The encoding benchmark counts what it says, and int8 keeps its promise on the model that comes with the project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import encoding
from benchmarks.encoding import added, figures, token_bytes


def test_added_error_and_bytes_by_hand() -> None:
    x = np.array([[1.0, 0.0], [3.0, 0.0]], np.float32)  # squared distance from the mean: 1 + 1
    assert added(x, x) == 0 and added(x, x + np.float32(0.5)) == pytest.approx(4 * 0.25 / 2)
    rows = np.random.default_rng(0).standard_normal((5000, 6)).astype(np.float32)
    assert token_bytes(rows, None) == 24 and token_bytes(np.zeros_like(rows), "zstd") < 0.1
    found = figures(rows)
    assert found["int8 bytes"] == 10 and found["bf16"] < found["int8"] < found["bitround"]


@pytest.mark.slow
def test_int8_adds_at_most_1e_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["encoding", "--rows", "9000", "--every", "3"])
    assert encoding.main() == 0
    print(told := capsys.readouterr().out)
    assert "resid_post.3 " in told and "mlp_out.5 " in told
