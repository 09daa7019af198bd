"""python -m pytest tests/harvest/test_documents.py"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.base.errors import UserError
from harvest.documents import (
    HELDOUT,
    TRAIN,
    DatasetText,
    Document,
    FilesText,
    StdlibText,
    source_from,
    split_of,
    unique,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_split_is_the_first_64_bits_of_sha256() -> None:
    # sha256("abc") begins ba7816bf8f01cfea: 0.72839...
    assert split_of("abc", 0.7283) == TRAIN
    assert split_of("abc", 0.7284) == HELDOUT


@given(st.text())
def test_split_is_total_at_the_ends(key: str) -> None:
    assert split_of(key, 0.0) == TRAIN
    assert split_of(key, 1.0) == HELDOUT


def test_split_takes_about_the_fraction() -> None:
    held = sum(split_of(f"key {i}", 0.1) == HELDOUT for i in range(10_000))
    assert abs(held - 1000) < 5 * 30  # five standard deviations


def test_unique_drops_blank_and_repeated_texts() -> None:
    docs = [Document(str(i), text, str(i)) for i, text in enumerate(["a", " \n", "b", "a", "", "c", "b"])]
    assert [doc.name for doc in unique(docs)] == ["0", "2", "5"]


def library(root: Path) -> Path:
    for name, text in {
        "os.py": "import os\n",
        "json/__init__.py": "x = 1\n",
        "json/decoder.py": "y = 2\n",
        "copy.py": "import os\n",  # the text of os.py again
        "test/test_os.py": "no\n",
        "json/tests/a.py": "no\n",
        "encodings/utf_8.py": "no\n",
        "site-packages/torch.py": "no\n",
        "_sysconfigdata__linux.py": "no\n",
        "notes.txt": "no\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_stdlib_leaves_out_what_is_not_prose_and_keys_by_module_path(tmp_path: Path) -> None:
    docs = list(StdlibText(root=str(library(tmp_path))).documents())
    assert [doc.name for doc in docs] == ["copy.py", "json/__init__.py", "json/decoder.py", "os.py"]
    assert all(doc.key == doc.name for doc in docs)
    assert [doc.name for doc in unique(docs)] == ["copy.py", "json/__init__.py", "json/decoder.py"]


def test_the_running_stdlib_is_there_and_not_tiny() -> None:
    names = [doc.name for doc in StdlibText().documents()]
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} < set(names)
    assert names == sorted(names)
    assert not any("/test/" in f"/{name}" for name in names)


def test_identity_follows_the_text(tmp_path: Path) -> None:
    source = StdlibText(root=str(library(tmp_path)))
    before = source.identity()
    assert before["documents"] == 3
    (tmp_path / "notes.txt").write_text("still not counted\n")
    assert source.identity() == before
    (tmp_path / "os.py").write_text("import os  # changed\n")
    after = source.identity()
    assert after["documents"] == 4
    assert after["sha256"] != before["sha256"]


def test_a_renamed_module_is_another_text(tmp_path: Path) -> None:
    source = StdlibText(root=str(library(tmp_path)))
    before = source.identity()["sha256"]
    (tmp_path / "json/decoder.py").rename(tmp_path / "json/decoded.py")
    assert source.identity()["sha256"] != before


def stories(path: Path, *texts: str, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def test_files_read_txt_whole_and_jsonl_by_line(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    (tmp_path / "a.txt").write_text("zero")
    path = stories(tmp_path / "c.jsonl", "three", "four")
    path.write_text(path.read_text() + "\n")
    source = FilesText(paths=[str(tmp_path / "*.txt"), str(tmp_path / "*.jsonl"), str(tmp_path / "a.txt")])
    docs = list(source.documents())
    assert [doc.text for doc in docs] == ["zero", "one\ntwo\n", "three", "four"]
    assert [doc.name for doc in docs][2:] == [f"{tmp_path}/c.jsonl:1", f"{tmp_path}/c.jsonl:2"]
    assert all(doc.key == doc.text for doc in docs)


def test_files_find_deeper_folders_and_names_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "deep[1].txt").write_text("deep")
    assert [d.text for d in FilesText(paths=[f"{tmp_path}/**/*.txt"]).documents()] == ["deep"]
    assert [d.text for d in FilesText(paths=f"{tmp_path}/x/y/deep[1].txt").documents()] == ["deep"]


def test_no_text_is_in_both_splits_whatever_file_it_is_in(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(200)]
    stories(tmp_path / "a.jsonl", *texts)
    stories(tmp_path / "b.jsonl", *texts[::-1])
    splits: dict[str, set[str]] = {TRAIN: set(), HELDOUT: set()}
    for doc in FilesText(paths=[str(tmp_path / "*.jsonl")]).documents():
        splits[split_of(doc.key, 0.3)].add(doc.text)
    assert not splits[TRAIN] & splits[HELDOUT]
    assert len(splits[TRAIN]) + len(splits[HELDOUT]) == 200
    assert min(map(len, splits.values())) > 30


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"text": "a"}\n{"text": \n', "bad.jsonl:2 is not JSON"),
        (b'{"words": "a"}\n', r"bad.jsonl:1 has no text under 'text' \(it has \['words'\]\): set text.field"),
        (b'{"text": 5}\n', "bad.jsonl:1 has a number under 'text', not a text: set text.field"),
        (b'["a"]\n', "bad.jsonl:1 has no text under 'text' .it is no object"),
        (b'{"text": "\xff"}\n', "bad.jsonl is not UTF-8"),
        (b"\n\n", "holds no document"),
        (b'{"text": "  "}\n', "holds no document"),
    ],
)
def test_files_that_hold_no_text_are_named(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=told):
        FilesText(paths=[str(tmp_path / "bad.jsonl")]).identity()


def test_files_that_are_not_there_or_of_another_kind_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(UserError, match=r"a\.csv is no text that can be read \(\.txt, \.jsonl"):
        FilesText(paths=[str(tmp_path / "*.csv")]).check()
    with pytest.raises(UserError, match=r"no file matches '.*none\.txt'"):
        FilesText(paths=[str(tmp_path / "none.txt")]).check()
    with pytest.raises(UserError, match=r"text\.paths names no file"):
        FilesText().check()
    with pytest.raises(UserError, match=r"text\.root=.* is not a folder"):
        StdlibText(root=str(tmp_path / "none")).check()


def parquet(path: Path, rows: dict[str, list[Any]]) -> FilesText:
    """Three rows a row group."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(rows), path, row_group_size=3)
    return FilesText(paths=[str(path)])


def test_files_read_parquet_by_row(tmp_path: Path) -> None:
    texts = [f"story {i} é" for i in range(700)]
    source = parquet(tmp_path / "a.parquet", {"id": list(range(700)), "text": texts})
    docs = list(source.documents())
    assert [doc.text for doc in docs] == [doc.key for doc in docs] == texts
    assert [docs[0].name, docs[-1].name] == [f"{tmp_path}/a.parquet:1", f"{tmp_path}/a.parquet:700"]
    lines = FilesText(paths=[str(stories(tmp_path / "a.jsonl", *texts))])
    assert lines.identity()["sha256"] == source.identity()["sha256"]


def test_parquet_that_holds_no_text_is_named(tmp_path: Path) -> None:
    whose = r"a\.parquet has no column 'text' \(\['words'\]\): set text\.field"
    with pytest.raises(UserError, match=whose):
        parquet(tmp_path / "a.parquet", {"words": ["a"]}).identity()
    with pytest.raises(UserError, match=r"c\.parquet:1 has a number under 'text', not a text"):
        parquet(tmp_path / "c.parquet", {"text": [5]}).identity()


@pytest.mark.parametrize("damage", ["no parquet", "cut", "a header of nothing"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: str) -> None:
    source = parquet(tmp_path / "a.parquet", {"text": [f"story {i}" for i in range(9)]})
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:40] = b"\xff" * 36 if damage == "a header of nothing" else data[4:40]
    data = {"no parquet": b"words", "cut": data[:-9]}.get(damage, data)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet is damaged or no parquet file \(.*\): download or convert it"):
        source.identity()


def test_parquet_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.parquet needs the extra `parquet`, .*install pyarrow`"):
        FilesText(paths=[str(tmp_path / "a.parquet")]).check()


def test_settings_rebuild_the_source(tmp_path: Path) -> None:
    for source in (
        StdlibText(),
        FilesText(paths=["a.txt", "b/*.jsonl"], field="words"),
        DatasetText(name="x/y", config="en", revision=COMMIT),
    ):
        settings = json.loads(json.dumps(source.settings()))
        assert source_from(settings) == source


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"text\.kind=books is unknown: choose one of stdlib, files, dataset"):
        source_from({"kind": "books"})
    with pytest.raises(UserError, match=r"text\.paths is no setting"):
        source_from({"kind": "stdlib", "paths": []})


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.util.spec_from_loader("datasets", None)
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_dataset_without_the_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the extra `datasets`"):
        DatasetText(name="x/y").check()
    with pytest.raises(UserError, match=r"text\.name names no data set"):
        DatasetText().check()


def test_dataset_reads_rows_at_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"body": "a"}, {"body": "b"}]

    fake_datasets(monkeypatch, load)
    source = DatasetText(name="x/y", config="en", split="test", revision=COMMIT, field="body")
    docs = list(source.documents())
    assert asked == [(("x/y", "en"), {"split": "test", "revision": COMMIT, "streaming": False})]
    assert docs == [Document("x/y:0", "a", "a"), Document("x/y:1", "b", "b")]
    with pytest.raises(UserError, match="x/y:0 has no text under 'text'"):
        list(DatasetText(name="x/y", revision=COMMIT).documents())


@pytest.mark.parametrize("streaming", [False, True])
def test_dataset_reads_a_folder_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    """The real library, on the files of a data set as they lie on the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "x").mkdir()
    texts = [f"story {i}" for i in range(9)]
    parquet(tmp_path / "x" / "train-00000-of-00002.parquet", {"text": texts[:5]})
    parquet(tmp_path / "x" / "train-00001-of-00002.parquet", {"text": texts[5:]})
    source = DatasetText(name=str(tmp_path / "x"), revision=COMMIT, streaming=streaming)
    assert [doc.text for doc in source.documents()] == [doc.text for doc in source.documents()] == texts
    assert any((tmp_path / "cache").rglob("*.arrow")) != streaming  # a set that is streamed is not copied


def test_dataset_identity_is_the_commit_a_branch_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, None)
    asked: list[Any] = []

    def dataset_info(self: Any, name: str, *, revision: str | None, timeout: float) -> Any:
        asked.append((name, revision))
        return types.SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    source = DatasetText(name="x/y", revision="main")
    settings = source.settings()
    assert settings.pop("chat") is None  # a text without chats has the identity it had before there were any
    assert source.identity() == settings | {"revision": COMMIT}
    assert asked == [("x/y", "main")]


def test_dataset_out_of_reach_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nmore lines")

    fake_datasets(monkeypatch, fail)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    with pytest.raises(UserError, match=r"data set 'x/y' .* cannot be read: no route: correct"):
        DatasetText(name="x/y").identity()
    with pytest.raises(UserError, match=r"data set 'x/y' .* cannot be read: no route: correct"):
        list(DatasetText(name="x/y", revision=COMMIT).documents())
