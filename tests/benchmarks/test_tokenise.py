"""The benchmark of tokenising counts what it says, on a text of the test's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tokenise
from benchmarks.tokenise import Took, table
from tests.helpers.corpus import write_stories


def test_speeds_and_ratios_by_hand() -> None:
    ways = {"alone": [Took(2.0, 1.0), Took(4.0, 2.0)], "twice": [Took(1.0, 1.0), Took(2.0, 4.0)]}
    lines = table(1000, ways)
    assert lines[2] == "| alone | 375 | 250 to 500 | 1.00 | 750 | 500 to 1,000 | 1.00 |"
    assert lines[3] == "| twice | 750 | 500 to 1,000 | 2.00 | 625 | 250 to 1,000 | 0.75 |"


@pytest.mark.slow
def test_every_way_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_stories(tmp_path / "stories.jsonl", range(200))
    assert tokenise.main(["--text", str(text), "--rounds", "1"]) == 0
    ways = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert ways == ["", ":--", "the tokenizer alone", "1 process", "2 processes", "read again"]
