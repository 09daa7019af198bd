"""What a kill, a signal, a second training or an edited file may do to a run's folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base.cli import CONF
from data.base.errors import UserError
from tests.helpers.runs import Broken, assert_same_sae, break_after, short_run
from train.resume import LAST, checkpoint_seal, only_writer
from train.run import train
from train.sae.variants.topk import TopK
from train.signals import Signals

SMALL = [
    *("batch=64", "calibration_tokens=256", "heldout_tokens=256", "sae.expansion=2", "sae.k=4", "sae=topk"),
    *("trainer=cpu", "loader.pool_chunks=4", "tokens=60_000", "epochs=20"),
]


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals, again: int = 0) -> None:
    """Send this process a signal in the step after `step`, and once more `again` steps later."""
    plain, steps = TopK.after_step, iter(range(100_000))

    def after_step(self: TopK, output: Any) -> None:
        plain(self, output)
        if next(steps) in (step, step + again):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(TopK, "after_step", after_step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_run_goes_on_bit_equal(
    short: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    settings = [f"out={tmp_path / 'run'}", "sae=topk", "checkpoint_every=1000"]
    train(short(*settings, f"out={tmp_path / 'whole'}"))
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        signal_at(patch, 12, number)
        train(short(*settings))
    assert ended.value.code == 128 + number
    assert handlers == [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    out = capsys.readouterr().out
    assert (
        f'interrupted; step 13 of 30 is saved, go on from there with: make train ARGS="resume={tmp_path / "run"}"'
        in out
    )
    train(short(f"resume={tmp_path / 'run'}"), [f"resume={tmp_path / 'run'}"])
    assert_same_sae(tmp_path / "run", tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once() -> None:
    signals = Signals()
    with signals:
        signals.deferring = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher passes it on, at the same moment
        assert signals.received == signal.SIGINT
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGINT)

    def enter() -> None:
        with Signals():
            assert signal.getsignal(signal.SIGINT) is before

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()


def test_a_checkpoint_comes_by_time(short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    from train import callbacks

    plain = callbacks.write_checkpoint

    def note(path: Path, state: Any) -> None:
        steps.append(state["step"])
        plain(path, state)

    monkeypatch.setattr(callbacks, "write_checkpoint", note)
    train(short("sae=topk", "checkpoint_every=1000", "checkpoint_minutes=1e-9"))
    assert steps == list(range(1, 31))
    steps.clear()
    train(short("sae=topk", "checkpoint_every=1000", f"out={tmp_path / 'other'}"))
    assert steps == [30]


@pytest.mark.slow
def test_a_process_that_gets_sigterm_saves_and_says_how_to_go_on(cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train", *SMALL, f"cache={cache}", f"hydra.run.dir={tmp_path}"]
    process = subprocess.Popen(command, cwd=CONF.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics.csv").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143 and f"resume={tmp_path}" in out and "Traceback" not in err
    assert (tmp_path / LAST).exists()


def test_a_second_training_into_a_folder_is_refused(short: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with only_writer(tmp_path / "run"):
        with pytest.raises(UserError, match=r"run is being written by another training: wait for it, or choose"):
            train(short("sae=topk"))
        assert not (tmp_path / "run" / "run.json").exists()
    train(short("sae=topk"))


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from train.resume import only_writer\n"
        "with only_writer(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, cwd=CONF.parent, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another training"), only_writer(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with only_writer(tmp_path):
        pass


@pytest.fixture(scope="module")
def at_step_20(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint at step 20, not to be changed."""
    folder = tmp_path_factory.mktemp("broken") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short_run(cache, folder, "sae=topk"))
    return folder


@pytest.fixture
def broken_off(at_step_20: Path, tmp_path: Path) -> Path:
    """A copy of it, in the folder of the test's own run."""
    return Path(shutil.copytree(at_step_20, tmp_path / "run"))


def test_another_run_s_checkpoint_is_refused(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_off: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_after(patch, 20)
        train(short("sae=topk", "seed=1", f"out={tmp_path / 'other'}"))
    (tmp_path / "other" / LAST).replace(broken_off / LAST)
    with pytest.raises(UserError, match=r"last\.ckpt is of another run than .*run\.json"):
        train(short("sae=topk"))


PARTS = ["step", "sae", "dead", "optimizer", "rng", "figures", "loader", "run", "seal"]


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_without_a_part_is_refused(short: Any, broken_off: Path, part: str) -> None:
    state = torch.load(broken_off / LAST, weights_only=True)
    del state[part]
    torch.save(state, broken_off / LAST)
    with pytest.raises(UserError, match=rf"lacks its part {part} "):
        train(short("sae=topk"))


@pytest.mark.parametrize("step", [10, 31, -1, True, "20"])
def test_an_edited_step_is_refused(short: Any, broken_off: Path, step: Any) -> None:
    state = torch.load(broken_off / LAST, weights_only=True)
    state["step"] = step
    torch.save(state, broken_off / LAST)
    with pytest.raises(UserError, match=rf"says step {step!r}, which does not agree"):
        train(short("sae=topk"))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("sae", {}),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("rng", {"cpu": torch.zeros(3)}),
        ("dead", {"x": 1}),
    ],
)
def test_a_part_of_another_shape_is_refused(short: Any, broken_off: Path, part: str, value: Any) -> None:
    state = torch.load(broken_off / LAST, weights_only=True)
    state[part] = value
    torch.save({**state, "seal": checkpoint_seal(state)}, broken_off / LAST)
    with pytest.raises(UserError, match="does not fit this run") as caught:
        train(short("sae=topk"))
    assert "\n" not in str(caught.value)


def test_a_run_that_diverged_says_so(short: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(short("sae=topk", "optimizer.lr=0.5", "clip=null"))
    err = capsys.readouterr().err
    assert "run diverged: its NMSE of " in err and "lower optimizer.lr (0.5)" in err
