"""metrics.csv: rows, a growing header, and what a continued run keeps."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from train.loggers import CsvLogger
from train.run import TrainRequest, train_all


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_header_grows_and_old_rows_stay(tmp_path: Path) -> None:
    log = CsvLogger(tmp_path)
    log.log_metrics({"train/loss": 0.5}, 10)
    log.log_metrics({"val/nmse": 0.25}, 10)
    log.log_metrics({"train/loss": 0.4}, 20)
    assert rows(tmp_path) == [
        {"step": "10", "train/loss": "0.5", "val/nmse": ""},
        {"step": "10", "train/loss": "", "val/nmse": "0.25"},
        {"step": "20", "train/loss": "0.4", "val/nmse": ""},
    ]


def test_a_continued_run_keeps_the_rows_up_to_its_step(tmp_path: Path) -> None:
    first = CsvLogger(tmp_path)
    for step in (10, 20, 30):
        first.log_metrics({"a": step}, step)
    second = CsvLogger(tmp_path)
    second.cut(20)
    second.log_metrics({"b": 1.0}, 30)
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [
        ("10", "10", ""),
        ("20", "20", ""),
        ("30", "", "1"),
    ]


def test_a_new_run_keeps_none(tmp_path: Path) -> None:
    CsvLogger(tmp_path).log_metrics({"a": 1.0}, 10)
    CsvLogger(tmp_path).cut(0)
    assert rows(tmp_path) == []


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    log = CsvLogger(tmp_path)
    log.log_metrics({"a": 1.0, "b": 2.0}, 10)
    with log.path.open("a") as file:
        file.write("20,1")
    again = CsvLogger(tmp_path)
    again.cut(20)
    again.log_metrics({"a": 3.0, "b": 4.0}, 20)
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [("10", "1", "2"), ("20", "3", "4")]


def test_a_kill_during_a_rewrite_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CsvLogger(tmp_path)
    log.log_metrics({"a": 1.0}, 10)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        log.log_metrics({"b": 2.0}, 20)  # a new name, so the header and all rows are written again
    assert rows(tmp_path) == [{"step": "10", "a": "1"}]


def test_a_last_line_cut_within_its_last_number_is_dropped(tmp_path: Path) -> None:
    log = CsvLogger(tmp_path)
    log.log_metrics({"a": 1.25}, 10)
    log.log_metrics({"a": 2.125}, 20)
    text = log.path.read_bytes()
    log.path.write_bytes(text[:-4])  # "20,2.1": every column is there, and the number is another
    CsvLogger(tmp_path).cut(20)
    assert rows(tmp_path) == [{"step": "10", "a": "1.25"}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_each_sae_of_a_pass_has_a_log_of_its_own(
    name: str, short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if find_spec(name) is None:
        pytest.skip(f'needs .venv/bin/pip install -e ".[{name}]"')
    monkeypatch.setenv("WANDB_SILENT", "true")
    folders = {k: tmp_path / f"sae.k-{k}" for k in (2, 4)}
    own = ["sae=topk", f"logger={name}", *(["logger.offline=true"] if name == "wandb" else [])]
    train_all([TrainRequest(short(f"out={folder}", f"sae.k={k}", *own)) for k, folder in folders.items()])
    assert "2 SAEs in one pass" in capsys.readouterr().out
    written = "*.wandb" if name == "wandb" else "tensorboard/events.*"
    found = {k: [path.read_bytes() for path in folder.rglob(written)] for k, folder in folders.items()}
    assert [len(files) for files in found.values()] == [1, 1]
    assert found[2] != found[4]
    if name == "tensorboard":  # what W&B writes is compressed
        assert all(b"train/nmse" in files[0] for files in found.values())
    assert all((folder / "metrics.csv").is_file() for folder in folders.values())
