"""The proof on a GPU runs through on a CPU with tiny sizes, so that its first flight fails on no typo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import main, table
from benchmarks.gpu.pieces import PIECES, Sizes, ceilings
from benchmarks.gpu.predictions import ADAM_BYTES, roofline_ms, state_gb


def test_the_roofline_is_worked_by_hand() -> None:
    # 2 * 4096 * 768 * 12288 / 400e12 s = 0.1933 ms; rows of 4 * 4096 * 32 * 768 bytes once from memory, 0.1342 ms, and
    # as bf16 gradients and inputs from the cache, 0.0805 ms; 64 * 12288 * 768 / 3e12 s = 0.2013 ms.
    assert roofline_ms(4096, 768, 12_288, 32) == pytest.approx(0.1933 + 0.1342 + 0.0805 + 0.2013, abs=2e-4)
    assert pytest.approx(51.54, abs=0.01) == ADAM_BYTES * 1_048_576 * 768 / 1e9
    assert state_gb(768, 1_048_576) == pytest.approx(25.77, abs=0.01)


def test_ceilings_read_something_of_every_product(tmp_path: Path) -> None:
    sizes = Sizes.tiny()
    readings = ceilings(sizes, tmp_path)
    assert len(readings) == 1 + 3 * len(sizes.products)
    assert all(reading["reading"] > 0 for reading in readings)


def test_a_table_shows_readings_beside_what_was_expected() -> None:
    held = {"machine": {}, "a": {"readings": [{"name": "x", "reading": 2.0, "expected": 4, "of_floor": 1.5}]}}
    assert table(held).splitlines()[2:] == ["| a | x | 2 | 4 | of_floor 1.5 |"]


def test_readings_go_to_a_json_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tiny", "--out", str(tmp_path / "readings")])
    assert "is to be a file that ends in .json" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_piece_runs_on_a_cpu_and_is_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "proof.json"
    pieces = [name for name in PIECES if name != "kernels"]  # these are the suite's own slow tests
    main(["--tiny", "--out", str(out), "--pieces", *pieces])
    held = json.loads(out.read_text())
    assert all(held[name]["readings"] and "failed" not in held[name] for name in pieces)
    assert all(row["reading"] == 0 for row in held["variants"]["readings"])  # on a CPU two runs are the same
    capsys.readouterr()
    main(["--tiny", "--out", str(out), "--pieces", *pieces])
    assert capsys.readouterr().out.count("done before") == len(pieces)
