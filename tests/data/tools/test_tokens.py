"""`python -m data` on stores of tokens: what is listed, what is damage, what may go."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.__main__ import main
from data.base.errors import UserError
from data.base.records import Json, seal, unseal
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import Store
from data.store.token_store import DocumentTable, TokenRange, TokenStore, tokens_identity
from data.tools.tokens import verify_tokens
from tests.data.conftest import manifest

IDENTITY: Json = {
    "text": {"kind": "files", "paths": ["a.txt"], "field": "text", "documents": 5, "sha256": "ab"},
    "tokenizer": "cd",
    "packing": {"context": 8, "bos": "document", "shuffle": 0, "heldout": 0.1},
}


def token_range(number: int, last: bool = False) -> TokenRange:
    """Three documents, of 3, 0 and 2 tokens."""
    tokens = np.array([5, 6, 7, 8, 9], np.int32) + 10 * number
    table = DocumentTable(
        lengths=np.array([3, 0, 2]),
        own=np.array([False, False, True]),
        firsts=np.array([tokens[0], -1, tokens[3]], np.int32),
        largest=np.array([tokens[2], -1, tokens[4]], np.int32),
        wanted=np.array([True, True, True, False, True]),
        special=tokens == 6,
        names=["a", "b\n\udc80", "c"],
    )
    return TokenRange(table, tokens, 17, last)


def token_store(cache: Path, identity: Json = IDENTITY) -> TokenStore:
    of_tokens = tokens_identity(identity)
    assert of_tokens is not None
    store = TokenStore.create_or_open(cache, of_tokens, {"model": "tiny", "text": {"paths": ["a.txt"]}})
    for number in range(2):
        store.write(TRAIN, number, token_range(number, last=number == 1))
    store.write(HELDOUT, 0, token_range(0))
    return store


def store_of_the_text(cache: Path) -> Store:
    return Store.create_or_open(cache, manifest(**IDENTITY))


def told(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = main([str(arg) for arg in args])
    return code, capsys.readouterr().out


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = TokenStore.open(token_store(tmp_path).path)
    assert store.numbers(TRAIN) == [0, 1] and store.tokens(TRAIN, 1).tolist() == [15, 16, 17, 18, 19]
    table, given = store.table(TRAIN, 0), token_range(0).table
    for name in ("lengths", "own", "firsts", "largest", "wanted", "special"):
        assert np.array_equal(getattr(table, name), getattr(given, name)), name
    assert table.names == given.names
    record = store.record(TRAIN, 1)
    assert record is not None and (record.tokens, record.documents, record.characters, record.last) == (5, 3, 17, True)
    assert store.record(TRAIN, 2) is None
    with pytest.raises(UserError, match=r"000002.json is missing: run the same harvest again"):
        store.tokens(TRAIN, 2)


def test_a_range_is_committed_once(tmp_path: Path) -> None:
    store = token_store(tmp_path)
    first = store.write(HELDOUT, 1, token_range(1))
    assert store.write(HELDOUT, 1, token_range(2)) == first
    assert store.tokens(HELDOUT, 1)[0] == 15


def test_the_same_text_has_one_store_however_it_was_reached() -> None:
    other = {**IDENTITY, "text": {**IDENTITY["text"], "paths": ["b.txt"]}, "model": {"name": "x"}, "lm_batch": 3}
    assert tokens_identity(other) == tokens_identity(IDENTITY)
    for change in (
        {"tokenizer": "ef"},
        {"chat_template": "1"},
        {"text": {**IDENTITY["text"], "sha256": "ac"}},
        {"packing": {**IDENTITY["packing"], "shuffle": None}},
    ):
        assert tokens_identity({**IDENTITY, **change}) != tokens_identity(IDENTITY)
    assert tokens_identity({"model": {"name": "x"}}) is None


def test_list_and_info_say_what_there_is_and_who_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = token_store(tmp_path)
    code, out = told(capsys, "list", tmp_path)
    assert code == 0 and f"{store.path}  tokens, " in out and "text.paths=" in out and "read by no store" in out
    assert "train: 10 tokens of 6 documents in 2 ranges, to the text's end; heldout: 5 tokens" in out
    reader = store_of_the_text(tmp_path)
    assert f"read by {reader.path.name}" in told(capsys, "list", tmp_path)[1]
    out = told(capsys, "info", store.path)[1]
    assert f"fingerprint {store.description.fingerprint}" in out and "  tokenizer: cd" in out
    assert f"tokens: {store.path}" in told(capsys, "info", reader.path)[1]


def test_verify_names_each_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = token_store(tmp_path)
    assert verify_tokens(store.path) == []
    assert told(capsys, "verify", tmp_path)[1].count("sound, tokens") == 1
    for path in sorted(path for path in store.path.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], None):
            path.write_bytes(damage) if damage is not None else path.unlink()
            findings = verify_tokens(store.path)
            a_record_is_gone = damage is None and "records" in path.parts
            # Without its record a range is none: its files are left over, and the next harvest makes them anew.
            if a_record_is_gone:
                assert len(findings) == 2 and all(finding.leftover for finding in findings)
            else:
                assert [finding.path for finding in findings if not finding.leftover] == [path]
                assert told(capsys, "verify", store.path)[0] == 1
            path.write_bytes(whole)
    (store.path / "notes").write_text("x")
    assert [(finding.path.name, finding.leftover) for finding in verify_tokens(store.path)] == [("notes", True)]


def test_verify_holds_records_against_their_files(tmp_path: Path) -> None:
    store = token_store(tmp_path)
    path = store.path / "records/train/000000.json"
    record = unseal(path.read_bytes(), path, "")
    for change, said in (
        ({"tokens": 6}, "other tokens"),
        ({"documents": 2}, "other documents"),
        ({"number": 1}, "range 1"),
    ):
        path.write_bytes(seal({**record, **change}))
        assert any(said in finding.what for finding in verify_tokens(store.path)), change


def age(folder: Path) -> None:
    then = time.time() - 7200
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def test_gc_spares_tokens_that_a_store_may_be_extended_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, outputs = tmp_path / "cache", tmp_path / "out"
    outputs.mkdir()
    store, other = token_store(cache), token_store(cache, {**IDENTITY, "tokenizer": "of no store"})
    reader = store_of_the_text(cache)
    (outputs / "config.json").write_text(f'{{"fingerprint": "{reader.manifest.fingerprint}"}}')
    (store.path / "left.tmp").write_text("x")
    args = ("gc", cache, "--outputs", outputs, "--yes")
    assert told(capsys, *args)[1].count("written to in the last 60 minutes") == 3
    age(cache)
    out = told(capsys, *args)[1]
    assert f"may go: {other.path}  no store in {cache} is of its text" in out and "removed 2 of 2" in out
    assert not other.path.exists() and verify_tokens(store.path) == []
    (outputs / "config.json").unlink()
    age(cache)
    assert "removed 1 of 1" in told(capsys, *args)[1] and not reader.path.exists()
    assert "removed 1 of 1" in told(capsys, *args)[1] and not store.path.exists()


def test_gc_keeps_tokens_beside_a_store_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, reader = token_store(tmp_path / "cache"), store_of_the_text(tmp_path / "cache")
    (tmp_path / "out").mkdir()
    (reader.path / "manifest.json").write_text("{}")
    age(tmp_path / "cache")
    out = told(capsys, "gc", tmp_path / "cache", "--outputs", tmp_path / "out", "--yes")[1]
    assert f"left alone: {store.path}  tokens, " in out and "whether it is needed cannot be read" in out
    assert store.path.exists()


def test_a_newer_format_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    store = token_store(tmp_path)
    path = store.path / "tokens.json"
    obj = unseal(path.read_bytes(), path, "")
    path.write_bytes(seal({**obj, "format": 2}))
    with pytest.raises(UserError, match=r"tokens\.json is of a newer format"):
        TokenStore.open(store.path)
    path.write_bytes(seal({**obj, "identity": {}}))
    with pytest.raises(UserError, match=r"tokens\.json is damaged: delete its folder"):
        TokenStore.open(store.path)
    with pytest.raises(UserError, match="is no store of tokens"):
        TokenStore.open(tmp_path)


def test_ranges_of_an_existing_store_are_adopted(tmp_path: Path) -> None:
    store = token_store(tmp_path)
    small = replace(store.sizes, first=3)
    again = TokenStore.create_or_open(tmp_path, store.description.identity, {}, small)
    assert again.sizes == store.sizes != small
