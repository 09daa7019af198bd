"""The trainer's benchmark."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import trainer
from benchmarks.loader import build


def test_every_sae_has_its_bare_steps_on_the_run_s_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[Any] = []
    plain = trainer.Bare.step
    monkeypatch.setattr(trainer.Bare, "step", lambda self, x_BD: (steps.append(x_BD), plain(self, x_BD)))
    args = Namespace(variant="topk", trainer="cpu", turns=3, steps=2, overrides=["sae.k=4"])
    trainer.compare(build(tmp_path, 16, 64, chunks=64), tmp_path / "runs", 2, 64, args, width=32)
    assert len(steps) == 2 * 2 * 4 and {tuple(x.shape) for x in steps} == {(64, 16)}
    assert all(x.dtype == torch.float32 for x in steps)
    assert re.search(r"topk d=16 F=32 B=64, 2 at once: run .* \(ratio \d+\.\d{3}\)", capsys.readouterr().out)
