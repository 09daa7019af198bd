"""The commands that a harvest ends with: the next stage takes them as they are printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from data.base.sites import Site
from harvest.run import harvest
from harvest.summary import module_pair
from tests.helpers.composing import composed
from tests.helpers.corpus import config, save_model, write_stories
from train.config import TrainSettings
from train.plan import make_plan

ENOUGH = ("tokens=1600", "heldout_tokens=200")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("texts") / "stories.jsonl", range(80))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "plain")


def printed(out: str, beginning: str) -> list[str]:
    """The command of the line that begins so, in its words; none where there is no such line."""
    lines = [line.removeprefix(beginning) for line in out.splitlines() if line.startswith(beginning)]
    return shlex.split(lines[0]) if lines else []


def test_what_a_module_reads_and_puts_out_makes_a_transcoder(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest(config(model, text, tmp_path, *ENOUGH, "sites=[resid_post.0,mlp_in.1,mlp_out.1]"))
    out = capsys.readouterr().out
    assert "site=resid_post.0" in printed(out, "train on it: ")
    command = printed(out, "or a transcoder: ")
    assert command[:3] == [".venv/bin/python", "-m", "train"]
    plan = make_plan(TrainSettings.of(composed("train", (*command[3:], f"out={tmp_path / 'run'}"), {})))
    assert (plan.site, plan.target) == ("mlp_in.1", "mlp_out.1") and plan.steps > 0


def test_without_its_output_an_input_makes_none(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harvest(config(model, text, tmp_path, *ENOUGH, "sites=[mlp_in.1,mlp_out.0]"))
    out = capsys.readouterr().out
    assert "site=mlp_in.1" in printed(out, "train on it: ") and printed(out, "or a transcoder: ") == []


def test_the_other_half_of_a_pair_may_be_older(model: Path, text: Path, tmp_path: Path) -> None:
    harvest(config(model, text, tmp_path, *ENOUGH, "sites=[attn_in.2,mlp_out.0]"))
    store = harvest(config(model, text, tmp_path, *ENOUGH, "sites=[attn_out.2]"))
    assert module_pair(store, [Site.parse("attn_out.2")]) == ("attn_in.2", "attn_out.2")
    assert module_pair(store, [Site.parse("mlp_out.0")]) is None
