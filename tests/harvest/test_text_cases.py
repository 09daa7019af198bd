"""python -m pytest tests/harvest/test_text_cases.py: texts as people have them, harvested or refused in a sentence."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.base.errors import UserError
from data.loading.reader import open_reader
from data.store.manifest import HELDOUT, TRAIN, Manifest
from data.store.store import TOKENS, Store
from harvest.documents import FilesText
from harvest.lm import LanguageModel
from harvest.packing import Packing, added_special_ids, pack, special_ids
from harvest.run import harvest
from tests.helpers.corpus import BOS, EOS, LETTERS, build, config, ids, save_model, story, tokenizer, write_stories


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


TEXTS = [story(number) for number in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def texts(*paths: Path, field: str = "text") -> list[str]:
    return [doc.text for doc in FilesText(paths=[str(path) for path in paths], field=field).documents()]


def zstd(data: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


def parquet(path: Path, column: Any, name: str = "text") -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: column}), path)
    return path


# Forms of files


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "de"}\n{"text": "\\ufefff"}\n')
    parquet(tmp_path / "c.parquet", ["\ufeffgh"])
    found = texts(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet")
    assert found == ["abc", "de", "f", "gh"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("in.jsonl.gz", gzip.compress(LINES.encode())),
        ("in.jsonl.gz", gzip.compress(LINES[:200].encode()) + gzip.compress(LINES[200:].encode())),
        ("in.jsonl.zst", zstd(LINES.encode())),
        ("in.jsonl.zst", zstd(LINES[:200].encode()) + zstd(LINES[200:].encode())),
        ("IN.JSONL", LINES.encode()),
        ("in.JsonL.GZ", gzip.compress(LINES.encode())),
        ("in.ndjson", LINES.encode()),
        ("in.json", LINES.encode()),
        ("in.json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("in.json.gz", gzip.compress(json.dumps([{"text": text} for text in TEXTS]).encode())),
    ],
)
def test_packed_files_and_other_suffixes_hold_the_same_text(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == TEXTS


def test_one_packed_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.TXT.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\ntwo"))
    assert texts(tmp_path / "a.TXT.gz") == ["one\ntwo"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES.encode())[:-20]),
        ("flipped.jsonl.gz", gzip.compress(LINES.encode())[:30] + b"\0" * 40 + gzip.compress(LINES.encode())[70:]),
        ("plain.jsonl.gz", LINES.encode()),
        ("plain.txt.zst", LINES.encode()),
        ("cut.txt.zst", zstd(LINES.encode())[:60]),
    ],
)
def test_a_packed_file_that_is_damaged_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged or not compressed \(.*\): download it again"):
        texts(tmp_path / name)


def test_a_folder_is_all_texts_below_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b/two.txt", "a.txt", "b/.hidden/no.txt", ".no.txt", "b/picture.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    assert texts(tmp_path / "in") == ["a.txt", "b/two.txt"]
    assert "picture.png and other files that are no text are left out" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder .*empty holds no \.txt, \.jsonl or \.parquet"):
        texts(tmp_path / "empty")


# What stands under the field


def test_a_lone_surrogate_is_the_replacement_character(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(tmp_path / "a.jsonl") == ["ok", "a\ufffdb", "\U0001f600"]
    assert "a.jsonl:2 holds a lone surrogate: it is read as U+FFFD" in capsys.readouterr().err


def test_the_identity_is_of_the_text_that_is_tokenised(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a\\ufffdb"}\n')
    hashes = [FilesText(paths=[str(tmp_path / name)]).identity()["sha256"] for name in ("a.jsonl", "b.jsonl")]
    assert hashes[0] == hashes[1]


def test_nulls_are_left_out_and_counted_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = parquet(tmp_path / "a.parquet", ["one", None, "two", None])
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "three"}\n')
    source = FilesText(paths=[str(path), str(tmp_path / "a.jsonl")])
    assert source.identity()["documents"] == 3
    source.identity()
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition("/")[2] for line in said] == [
        "a.parquet: 2 documents are null and are left out",
        "a.jsonl: 1 document is null and is left out",
    ]


@pytest.mark.parametrize(
    ("column", "sentence"),
    [
        ([["a", "b"]], r"in\.parquet:1 has a list of texts under 'text', not a text: join each list to one text"),
        ([b"abc"], r"in\.parquet:1 has binary data under 'text', not a text: store the column as strings"),
        ([[0.5, 1.0]], "has a list of numbers that are no token ids under 'text'"),
        ([[3, -1]], "has a list of numbers that are no token ids under 'text'"),
        ([{"a": 1}], "has an object under 'text'"),
        ([True], "has true or false under 'text'"),
    ],
)
def test_a_column_of_something_else_is_named(tmp_path: Path, column: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        texts(parquet(tmp_path / "in.parquet", column))


def test_a_text_of_one_document_says_so(model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(TEXTS))
    with pytest.raises(UserError, match=r"heldout_tokens=40: the text is 1 document, and whole documents are held out"):
        harvest(config(model, tmp_path / "book.txt", tmp_path / "cache"))
    advice = ("heldout_tokens=0", "packing.heldout=0")
    assert harvest(config(model, tmp_path / "book.txt", tmp_path / "cache", *advice)).rows(TRAIN, "resid_post.1") >= 200


# Token ids


def bare(model: Path, folder: Path) -> Path:
    """A copy without its tokenizer."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "vocab*"))
    return folder


def stored_tokens(store: Store) -> list[int]:
    reader, tokens = open_reader(store, TRAIN, TOKENS), []
    for index, rows in enumerate(reader.sizes):
        chunk = np.zeros(rows, np.int32)
        reader.read(index, chunk)
        tokens += chunk.tolist()
    return sorted(tokens)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_token_ids_need_no_tokenizer_and_make_the_rows_of_their_text(model: Path, tmp_path: Path, form: str) -> None:
    lists = [ids(text) for text in TEXTS]
    path = tmp_path / f"ids.{form}"
    if form == "parquet":
        parquet(path, lists, "input_ids")
    else:
        path.write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in lists))
    write_stories(tmp_path / "words.jsonl", range(40))
    # The source's order: a shuffle goes by the text itself.
    same = ("packing.shuffle=null", "packing.heldout=0", "heldout_tokens=0")
    by_ids = harvest(config(bare(model, tmp_path / "bare"), path, tmp_path / "a", "text.field=input_ids", *same))
    by_text = harvest(config(model, tmp_path / "words.jsonl", tmp_path / "b", *same))
    assert stored_tokens(by_ids) == stored_tokens(by_text)
    assert by_ids.stats(TRAIN, "resid_post.1").sum_sq == by_text.stats(TRAIN, "resid_post.1").sum_sq


def test_token_ids_get_no_second_bos(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"ids": [0, 5, 6]}\n{"ids": [7, 8, 9]}\n{"ids": []}\n')
    source = FilesText(paths=[str(tmp_path / "ids.jsonl")], field="ids")
    packing = Packing.of({"context": 7, "heldout": 0, "shuffle": None})
    assert pack(source, tokenizer(), packing, TRAIN, 5).contexts.tolist() == [[0, 5, 6, 0, 7, 8, 9]]


def test_text_for_a_model_without_a_tokenizer_is_refused_at_once(model: Path, tmp_path: Path) -> None:
    path = write_stories(tmp_path / "words.jsonl", range(40))
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer\.json\): copy it there, or give the text as"):
        harvest(config(bare(model, tmp_path / "bare"), path, tmp_path / "cache"))


def test_a_token_beyond_the_embedding_is_named_before_the_model_runs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"ids": [5, 6]}\n{"ids": [7, 42, 9]}\n')
    small = ("tokens=4", "heldout_tokens=0", "packing.context=2", "packing.heldout=0", "text.field=ids")
    with pytest.raises(UserError, match=r"document .*ids\.jsonl:2 holds token 42 .*embedding has only 42 rows"):
        harvest(config(model, tmp_path / "ids.jsonl", tmp_path / "cache", *small))
    assert not list((tmp_path / "cache").glob("tiny-*"))
    (tmp_path / "huge.jsonl").write_text(json.dumps({"ids": [2**40]}))
    with pytest.raises(UserError, match="a list of numbers that are no token ids"):
        harvest(config(model, tmp_path / "huge.jsonl", tmp_path / "cache", *small))


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_fine_while_the_text_has_none(tmp_path: Path) -> None:
    save_model(tmp_path / "tiny")
    more = tokenizer()
    more.add_tokens(["<think>"])
    more.save_pretrained(tmp_path / "tiny")
    path = write_stories(tmp_path / "words.jsonl", range(40))
    assert harvest(config(tmp_path / "tiny", path, tmp_path / "cache")).rows(TRAIN, "resid_post.1") >= 200


def test_a_vocabulary_of_four_tokens(tmp_path: Path) -> None:
    """Its architecture is not among those declared, and is proved on tokens that it has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", vocab_size=4, **sizes, **ends))
    made.save_pretrained(tmp_path / "four")
    rng = np.random.default_rng(0)
    path = tmp_path / "moves.jsonl"
    path.write_text("".join(json.dumps({"text": rng.integers(0, 4, 50).tolist()}) + "\n" for _ in range(40)))
    store = harvest(config(tmp_path / "four", path, tmp_path / "cache", "sites=[resid_mid.0]"))
    assert store.rows(TRAIN, "resid_mid.0") >= 200 and set(stored_tokens(store)) == {2, 3}


# Special tokens


def test_special_tokens_added_beside_the_tokenizer_s_own_are_no_rows(model: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken

    more = tokenizer()
    more.add_tokens([AddedToken("<turn>", special=True), AddedToken("<word>", special=False)])
    turn, word = (more.convert_tokens_to_ids(name) for name in ("<turn>", "<word>"))
    assert special_ids(more) == [0, 1, turn] and turn not in more.all_special_ids
    assert added_special_ids(tokenizer()) == []
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a<turn>b<word>c"}) + "\n")
    source = FilesText(paths=[str(tmp_path / "a.jsonl")])
    packing = Packing.of({"context": 5, "heldout": 0, "bos": "none"})
    packed = pack(source, more, packing, TRAIN, 4)
    assert packed.contexts.tolist() == [[ids("a")[0], turn, ids("b")[0], word, ids("c")[0]]]
    assert packed.keep.tolist() == [[True, False, True, True, True]]


def test_a_store_made_with_their_rows_is_not_added_to(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    folder = save_model(tmp_path / "tiny")
    more = tokenizer()
    more.add_tokens([AddedToken("<turn>", special=True)])
    more.save_pretrained(folder)
    path = write_stories(tmp_path / "words.jsonl", range(40))
    store = harvest(config(folder, path, tmp_path / "cache"))
    identity = dict(store.manifest.identity)
    assert identity.pop("special_tokens") == [3 + len(LETTERS)]
    # As yesterday's version wrote it.
    old = Manifest(identity, store.manifest.settings, store.manifest.name, store.manifest.d_model)
    shutil.rmtree(store.path)
    (tmp_path / "cache" / old.folder).mkdir()
    (tmp_path / "cache" / old.folder / "manifest.json").write_bytes(old.to_json())
    with pytest.raises(UserError, match=r"was made otherwise \(special_tokens: absent here, \[42\] asked\)"):
        harvest(config(folder, path, tmp_path / "cache"))


# One content, one store


def test_the_spelling_of_a_path_makes_no_other_store(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_stories(tmp_path / "in.jsonl", range(40))
    store = harvest(config(model, path, tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copy(path, tmp_path / "copy.jsonl"))
    moved = Path(shutil.copytree(model, tmp_path / "another-name"))
    for cfg in (
        config(model, Path("in.jsonl"), tmp_path / "cache"),
        config(model, copy, tmp_path / "cache"),
        config(moved, path, tmp_path / "cache"),
        config(Path(os.path.relpath(model)), path, "cache"),
    ):
        capsys.readouterr()
        assert harvest(cfg).path.name == store.path.name
        said = capsys.readouterr().out
        assert said.startswith("nothing to do: ")
        assert f"python -m train store={cfg['cache']}/{store.path.name} site=resid_post.1 " in said
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [store.path.name, "tokens"]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    write_stories(copy, range(41))
    assert harvest(config(model, copy, tmp_path / "cache")).path != store.path


# What else decides the numbers


def test_an_adapter_beside_the_weights_is_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "adapted"))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    path = write_stories(tmp_path / "in.jsonl", range(40))
    with pytest.raises(UserError, match=r"holds an adapter beside the weights .*merge it into them"):
        harvest(config(folder, path, tmp_path / "cache"))


def test_a_weight_file_that_only_the_config_names_is_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "other"))
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(UserError, match=r"names a weight file of its own .*rename that file"):
        LanguageModel.of({"name": str(folder)}).check()


def test_every_local_file_that_decides_numbers_is_in_the_identity(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "quantised"))
    before = LanguageModel.of({"name": str(folder)}).identity()
    said = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.1}))
    assert LanguageModel.of({"name": str(folder)}).identity() == before
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "x"}}))
    assert LanguageModel.of({"name": str(folder)}).identity() != before


def test_code_in_a_model_s_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "custom"))
    said = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for kind in (said["model_type"], "nonesuch"):
        (folder / "config.json").write_text(json.dumps(said | {"model_type": kind, "auto_map": auto}))
        try:
            LanguageModel.of({"name": str(folder), "device": "cpu"}).load()
        except UserError as error:
            assert kind == "nonesuch" and "cannot be loaded" in str(error)
    assert not (tmp_path / "ran").exists()


# Order of work


def test_a_harvest_that_is_broken_off_has_both_splits(model: Path, tmp_path: Path) -> None:
    from data.store.manifest import Layout
    from harvest.packing import PackedTokens
    from harvest.units import plan

    def text(contexts: int) -> PackedTokens:
        return PackedTokens(np.zeros((contexts, 4), np.int32), np.ones((contexts, 4), np.bool_))

    layout = Layout("float32", 4, 4, 2, 0)  # two contexts a unit
    units = plan(None, layout, {TRAIN: text(12), HELDOUT: text(3)}, [])
    assert [(unit.split[0], unit.index) for unit in units] == [
        *(("t", 0), ("h", 0), ("t", 1), ("t", 2), ("t", 3), ("h", 1), ("t", 4), ("t", 5)),
    ]


def test_the_corpus_is_what_these_tests_take_it_for() -> None:
    assert build().get_input_embeddings().weight.shape[0] == 3 + len(LETTERS) == 42
    assert (tokenizer().convert_tokens_to_ids(BOS), tokenizer().convert_tokens_to_ids(EOS)) == (0, 1)
