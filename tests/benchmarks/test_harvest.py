"""python -m pytest tests/benchmarks/test_harvest.py"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import harvest
from benchmarks.harvest import Trial
from tests.helpers.corpus import build

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")


@pytest.mark.slow
@linux
def test_every_line_is_printed_and_a_missing_peer_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = Trial("tiny", build(), ("resid_post.1", "mlp_out.0"), 16, 2, 16, 2, 3)
    shares = harvest.run(trial, tmp_path, "bfloat16", 1, str(tmp_path / "none"))
    assert list(shares) == ["bare forward to resid_post.1", "ours, 1 sites", "ours, 2 sites"]
    assert shares["bare forward to resid_post.1"] == 1.0
    told = capsys.readouterr().out
    assert re.search(r"^sae-lens skipped: .*No such file", told, re.M)
    assert re.search(r"^memory, 2 sites: \d+ MB above the model .* units of 0\.0 MB; ", told, re.M)
    assert all(re.search(rf"^{name} +\d+ ", told, re.M) for name in shares)
    assert not list(tmp_path.iterdir())


@linux
def test_a_peer_without_the_library_is_told_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = Trial("tiny", build(), ("resid_post.1",), 16, 2, 16, 2, 1)
    with harvest.peer(trial, tmp_path, sys.executable) as other:
        assert other == "ModuleNotFoundError: No module named 'sae_lens'"
