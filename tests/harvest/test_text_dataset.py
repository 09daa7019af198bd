"""python -m pytest tests/harvest/test_text_dataset.py: streams that pause, break off and come back, or do not."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data.base.errors import UserError
from data.store.manifest import TRAIN
from data.store.store import Store
from harvest import text_dataset
from harvest.documents import DatasetText
from harvest.run import harvest
from harvest.text_dataset import StreamLost, is_network_error
from tests.helpers.corpus import config, save_model, story

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Rows = Iterator[dict[str, Any]]
SOURCE = DatasetText(name="some/set", revision=COMMIT, streaming=True)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Rows]], None]:
    """Let the datasets library load what a function yields, anew each time it is opened; retries take no time."""

    def install(rows: Callable[[], Rows]) -> None:
        module = types.ModuleType("datasets")
        module.__spec__ = importlib.util.spec_from_loader("datasets", None)
        module.load_dataset = lambda *args, **kwargs: rows()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)

    monkeypatch.setattr(text_dataset, "RETRY_S", (0.0, 0.0, 0.0))
    return install


def dropping(at: list[int], error: Exception) -> Callable[[], Rows]:
    """1,000 documents; the n-th time they are opened the connection drops before row `at[n]`."""
    opened = iter(at)

    def rows() -> Rows:
        end = next(opened, None)
        for number in range(1000):
            if number == end:
                raise error
            yield {"text": story(number)}

    return rows


def timeout() -> Exception:
    import requests

    return requests.exceptions.ReadTimeout("Read timed out.")


def test_a_stream_that_drops_is_read_on_from_where_it_was(
    serve: Callable[[Callable[[], Rows]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(dropping([120, 120, 500, 999], timeout()))
    assert [doc.text for doc in SOURCE.documents()] == [story(number) for number in range(1000)]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "data set some/set: connection lost at row 120 (ReadTimeout: Read timed out.); try 1 of 3 in 0 s"
    )
    assert [line.split(";")[1] for line in said] == [f" try {n} of 3 in 0 s" for n in (1, 2, 1, 1)]


def test_a_stream_that_does_not_come_back_is_one_sentence(serve: Callable[[Callable[[], Rows]], None]) -> None:
    serve(dropping([121] * 9, timeout()))
    with pytest.raises(
        StreamLost,
        match=r"data set 'some/set' broke off at row 121 \(ReadTimeout: Read timed out\.\) and did not come back",
    ) as error:
        list(SOURCE.documents())
    assert "run the same command again" in str(error.value) and "\n" not in str(error.value)
    assert sum(text_dataset.RETRY_S) == 0
    # The module's own pauses are minutes.
    spec = importlib.util.find_spec("harvest.text_dataset")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert sum(fresh.RETRY_S) > 240 and fresh.SILENCE_S == 10


def test_what_is_no_fault_of_the_network_is_not_tried_again(serve: Callable[[Callable[[], Rows]], None]) -> None:
    opened = []

    def rows() -> Rows:
        opened.append(1)
        yield {"text": "a"}
        yield {"words": "b"}

    serve(rows)
    with pytest.raises(UserError, match="some/set:1 has no text under 'text'"):
        list(SOURCE.documents())
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(104, "reset"), True),
        (OSError("Consistency check failed"), True),
        (OSError(28, "No space left on device"), False),
        (FileNotFoundError(2, "no"), False),
        (ValueError("bad"), False),
        (UserError("bad"), False),
        (MemoryError(), False),
    ],
)
def test_which_errors_may_pass(error: Exception, passes: bool) -> None:
    assert is_network_error(error) == passes


def test_errors_of_http_libraries_may_pass() -> None:
    import urllib3

    assert is_network_error(timeout()) and is_network_error(urllib3.exceptions.ProtocolError("cut"))


def test_silence_is_reported_and_the_reader_s_own_time_is_not(
    serve: Callable[[Callable[[], Rows]], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_dataset, "SILENCE_S", 0.05)

    def rows() -> Rows:
        yield {"text": "a"}
        time.sleep(0.5)
        yield {"text": "b"}

    serve(rows)
    source = DatasetText(name="slow/set", revision=COMMIT, streaming=True)
    assert [doc.text for doc in source.documents()] == ["a", "b"]
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith("data set slow/set: no row for ") for line in said)
    assert said[0].endswith("(waiting for row 1)") and len(said) <= 5  # each after twice as long

    serve(lambda: iter([{"text": "a"}, {"text": "b"}]))
    busy = DatasetText(name="busy/reader", revision=COMMIT, streaming=True)
    for _ in busy.documents():
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_nulls_of_a_stream_are_left_out_and_counted(
    serve: Callable[[Callable[[], Rows]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(lambda: iter([{"text": "a"}, {"text": None}, {"text": "b"}]))
    source = DatasetText(name="null/set", revision=COMMIT, streaming=True)
    assert [doc.text for doc in source.documents() if doc.text] == ["a", "b"]
    assert "null/set: 1 document is null and is left out" in capsys.readouterr().err


def test_the_real_library_is_read_on_by_skipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(text_dataset, "RETRY_S", (0.0,))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "x").mkdir()
    lines = "".join(json.dumps({"text": story(number)}) + "\n" for number in range(50))
    (tmp_path / "x" / "train.jsonl").write_text(lines)
    real, broke = datasets.IterableDataset.__iter__, []

    def once(self: Any) -> Rows:
        for number, row in enumerate(real(self)):
            if number == 20 and not broke:
                broke.append(number)
                raise timeout()
            yield row

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", once)
    source = DatasetText(name=str(tmp_path / "x"), revision=COMMIT, streaming=True)
    assert [doc.text for doc in source.documents()] == [story(number) for number in range(50)]
    assert broke == [20]


@pytest.mark.slow
def test_what_was_packed_of_a_lost_stream_is_harvested(
    serve: Callable[[Callable[[], Rows]], None], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "tiny")
    words = tmp_path / "unused.jsonl"
    words.write_text(json.dumps({"text": "a"}))
    cfg = config(model, words, tmp_path / "cache", "packing.shuffle=null", "packing.heldout=0", "heldout_tokens=0")
    cfg["text"] = SOURCE.settings()
    serve(dropping([70] * 9, timeout()))
    with pytest.raises(UserError, match=r"broke off at row 70 .*; what was read until then is harvested"):
        harvest({**cfg, "tokens": 5000})
    (path,) = (tmp_path / "cache").glob("tiny-*")
    lost = Store.open(path)
    units = lost.committed(TRAIN, "resid_post.1")
    assert len(units) > 10 and lost.rows(TRAIN, "resid_post.1") < 5000
    assert all(commit.chunks for commit in units.values())
    before = {unit: commit.chunks for unit, commit in units.items()}
    serve(dropping([], timeout()))
    whole = harvest({**cfg, "tokens": 5000})
    assert whole.path == path and whole.rows(TRAIN, "resid_post.1") >= 5000
    after = whole.committed(TRAIN, "resid_post.1")
    assert {unit: after[unit].chunks for unit in before} == before
    alone = harvest({**cfg, "tokens": 5000, "cache": str(tmp_path / "alone")})
    assert {u: c.chunks for u, c in alone.committed(TRAIN, "resid_post.1").items()} == {
        unit: commit.chunks for unit, commit in after.items()
    }
