"""python -m pytest tests/harvest/test_tokenise.py: text tokenised once, whatever comes between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.base.errors import UserError
from data.storage import leases
from data.store.manifest import HELDOUT, TRAIN
from data.store.token_store import RangeSizes
from harvest import lm
from harvest.chat import Chat
from harvest.documents import Document, TextSource
from harvest.packing import PackedTokens, Packing, pack
from harvest.run import harvest
from harvest.stored_text import StoredText
from harvest.text_dataset import StreamLost
from harvest.tokenise import Tokeniser
from tests.helpers.corpus import ROOT, config, contents, save_model, tokenizer, write_stories
from tests.helpers.tokens import (
    KILLED_PACKING,
    KILLED_ROWS,
    KILLED_TEXT,
    STORIES,
    Counting,
    Texts,
    plain,
    store_in,
    tokenised,
)


def assert_same_text(stored: StoredText, packed: PackedTokens) -> None:
    assert len(stored.contexts) == len(packed.contexts)
    assert stored.contexts[:].dtype == np.int32 and stored.keep[:].dtype == np.bool_
    assert (stored.contexts[:] == packed.contexts).all() and (stored.keep[:] == packed.keep).all()
    for at in (slice(0, 1), slice(1, 4), slice(len(packed.contexts) - 1, len(packed.contexts) + 5)):
        assert (stored.contexts[at] == packed.contexts[at]).all() and (stored.keep[at] == packed.keep[at]).all()
        assert stored.rows(at) == packed.keep[at].sum()
    for sequence, position in ((0, 0), (len(packed.contexts) - 1, packed.contexts.shape[1] - 1)):
        assert stored.document(sequence, position) == packed.document(sequence, position)


PACKINGS = st.builds(
    plain,
    st.integers(2, 40),
    bos=st.sampled_from(["context", "document", "none"]),
    separator=st.booleans(),
    keep_special=st.booleans(),
    shuffle=st.sampled_from([None, 0, 7]),
    heldout=st.sampled_from([0.0, 0.4]),
)
SIZES = st.builds(RangeSizes, st.sampled_from([200, 500]), st.sampled_from([500, 5000]), st.sampled_from([5, 1000]))


@settings(deadline=None, max_examples=15)
@given(PACKINGS, SIZES, st.sampled_from([TRAIN, HELDOUT]), st.integers(1, 5000), st.integers(1, 7))
def test_stored_tokens_are_packed_as_text_is(
    tmp_path_factory: pytest.TempPathFactory, packing: Packing, sizes: RangeSizes, split: str, rows: int, multiple: int
) -> None:
    """The same contexts, masks and names as `pack`, or the same sentence."""
    source = Texts(texts=STORIES)
    store = store_in(tmp_path_factory.mktemp("tokens"), sizes)
    tokeniser = Tokeniser(store, source, tokenizer(), packing, quiet=True)
    try:
        packed = pack(source, tokenizer(), packing, split, rows, multiple=multiple)
    except UserError as error:
        with pytest.raises(UserError) as ours:
            tokeniser.text(split, rows, multiple=multiple)
        assert str(ours.value) == str(error)
        return
    assert_same_text(tokeniser.text(split, rows, multiple=multiple), packed)


class Mixed(TextSource):
    """Texts, token ids with and without a BOS of their own, and chats of which only some rows may be harvested."""

    kind: str = "files"

    def check(self) -> None: ...

    def documents(self) -> Iterator[Document]:
        for number in range(12):
            yield Document(f"text {number}", STORIES[number], STORIES[number])
            yield Document.of_ids(f"own {number}", [0, 5 + number, 6, 1])
            yield Document.of_ids(f"bare {number}", [7 + number, 8])
            said = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"it is {number}"}]
            chat = Chat(said, "assistant").spelled()
            yield Document(f"chat {number}", chat, chat)


@pytest.mark.parametrize("bos", ["context", "document", "none"])
@pytest.mark.parametrize("keep_special", [False, True])
def test_chats_and_token_ids_are_packed_as_text_is(tmp_path: Path, bos: str, keep_special: bool) -> None:
    words = tokenizer()
    words.chat_template = "<s>{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    packing = plain(9, bos=bos, separator=True, keep_special=keep_special, shuffle=2)
    packed = pack(Mixed(), words, packing, TRAIN, 300, multiple=3)
    assert not packed.keep.all()
    assert_same_text(tokenised(tmp_path, Mixed(), packing, 300, multiple=3, tokenizer=words), packed)


def test_what_a_packing_adds_is_no_part_of_what_is_stored(tmp_path: Path) -> None:
    """Tokens stored for one packing serve any other of the same order."""
    source = Texts(texts=STORIES)
    tokenised(tmp_path, source, plain(16), 1000, split=TRAIN)
    before = contents(tmp_path)
    poisoned = Counting(lambda count: pytest.fail("a text was tokenised again"))
    for packing in (plain(7, bos="context", separator=True), plain(16, bos="none", keep_special=True)):
        stored = tokenised(tmp_path, source, packing, 1000, tokenizer=poisoned)
        assert_same_text(stored, pack(source, tokenizer(), packing, TRAIN, 1000))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("shuffle", [None, 3])
def test_more_rows_tokenise_what_is_new_alone(tmp_path: Path, shuffle: int | None) -> None:
    source, packing = Texts(texts=STORIES), plain(8, shuffle=shuffle)
    first, more = Counting(), Counting()
    tokenised(tmp_path, source, packing, 1000, tokenizer=first)
    files = contents(tmp_path)
    stored = tokenised(tmp_path, source, packing, 3000, tokenizer=more)
    assert contents(tmp_path).items() > files.items()
    ranges = store_in(tmp_path).numbers(TRAIN)
    made = [store_in(tmp_path).record(TRAIN, number) for number in ranges]
    assert first.documents + more.documents == sum(record.documents for record in made if record) <= 60
    assert_same_text(stored, pack(source, tokenizer(), packing, TRAIN, 3000))
    tokenised(tmp_path / "at once", source, packing, 3000)
    assert contents(tmp_path / "at once" / "tokens").items() <= contents(tmp_path / "tokens").items()


class Stopped(Exception):
    """Stands for a crash."""


@settings(deadline=None, max_examples=6)
@given(st.integers(1, 60), st.sampled_from([None, 0]), st.integers(1, 3))
def test_any_stop_and_any_number_of_workers_make_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, stop: int, shuffle: int | None, workers: int
) -> None:
    """One is stopped after some documents, then several go on at once; each has the contexts of `pack`."""
    folder, source, packing = tmp_path_factory.mktemp("stopped"), Texts(texts=STORIES), plain(8, shuffle=shuffle)

    def crash(count: int) -> None:
        if count >= stop:
            raise Stopped

    with pytest.raises(Stopped):
        tokenised(folder, source, packing, 3300, tokenizer=Counting(crash))
    done: list[StoredText] = []
    threads = [
        threading.Thread(target=lambda: done.append(tokenised(folder, source, packing, 3300))) for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == workers
    packed = pack(source, tokenizer(), packing, TRAIN, 3300)
    for stored in done:
        assert_same_text(stored, packed)
    alone = tmp_path_factory.mktemp("alone")
    tokenised(alone, source, packing, 3300)
    assert contents(folder) == contents(alone)


def test_workers_share_the_ranges(tmp_path: Path) -> None:
    """While one is held up in a range, another makes all others of the round and then waits for it."""
    source, packing, held = Texts(texts=STORIES), plain(8), threading.Event()
    tokenised(tmp_path / "alone", source, packing, 3300)
    first = store_in(tmp_path / "alone").record(TRAIN, 0)
    assert first is not None
    slow = Counting(lambda count: count > first.documents and held.wait(60))  # in its second range
    quick = Counting()
    threads = [
        threading.Thread(target=tokenised, args=(tmp_path, source, packing, 3300), kwargs={"tokenizer": words})
        for words in (slow, quick)
    ]
    threads[0].start()
    deadline = time.monotonic() + 60
    while slow.documents <= first.documents and time.monotonic() < deadline:
        time.sleep(0.01)
    threads[1].start()
    store = store_in(tmp_path)
    while len(store.numbers(TRAIN)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 1 not in store.numbers(TRAIN) and threads[1].is_alive()
    held.set()
    for thread in threads:
        thread.join(60)
    numbers = store.numbers(TRAIN)
    made = [record.documents for number in numbers if (record := store.record(TRAIN, number))]
    assert numbers == list(range(len(made))) and slow.documents + quick.documents == sum(made)
    assert quick.documents > 0 and not (store.path / "claims").exists()


def test_the_range_of_a_dead_worker_is_taken_over(tmp_path: Path) -> None:
    source, packing = Texts(texts=STORIES), plain(8)
    store = store_in(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (store.path / "claims").mkdir()
    owner = {"host": leases.this_host(), "pid": process.pid, "token": "x", "names": ["tokens"], "made_by": {}}
    (store.path / "claims" / "train.000001").write_text(json.dumps(owner))
    (store.path / "claims" / "train.000001.tokens.0123").mkdir()
    (store.path / "claims" / "train.000001.tokens.0123" / "train.000001.tokens").write_bytes(b"half a ran")
    stored = tokenised(tmp_path, source, packing, 3000)
    assert_same_text(stored, pack(source, tokenizer(), packing, TRAIN, 3000))
    assert not (store.path / "claims").exists()


def test_a_damaged_range_is_named_and_made_anew(tmp_path: Path) -> None:
    source, packing = Texts(texts=STORIES), plain(8)
    tokenised(tmp_path, source, packing, 3000)
    before = contents(tmp_path)
    for name in ("train.000001.tokens", "train.000001.documents"):
        path, record = store_in(tmp_path).path / name, store_in(tmp_path).path / "records/train/000001.json"
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
        with pytest.raises(UserError, match=rf"{name} is damaged: delete {record} and run the same harvest again"):
            tokenised(tmp_path, source, packing, 3000).contexts[:]
        record.unlink()
        words = Counting()
        tokenised(tmp_path, source, packing, 3000, tokenizer=words)
        assert contents(tmp_path) == before and 0 < words.documents <= 9


def test_a_document_that_cannot_be_tokenised_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    def refuse(text: str) -> None:
        raise UserError(f"{text} is no chat")

    class Picky(Counting):
        def __call__(self, texts: Any, **options: Any) -> Any:
            if STORIES[30] in texts:
                refuse("doc 30")
            return super().__call__(texts, **options)

    source, packing = Texts(texts=STORIES), plain(8)
    stored = tokenised(tmp_path, source, packing, 1000, tokenizer=Picky())
    assert_same_text(stored, pack(source, tokenizer(), packing, TRAIN, 1000))
    for _ in range(2):  # by what is stored, too
        with pytest.raises(UserError, match=r"^doc 30 is no chat$"):
            tokenised(tmp_path, source, packing, 3300, tokenizer=Picky())


def test_a_token_beyond_the_embedding_is_refused_only_where_it_is_needed(tmp_path: Path) -> None:
    source, packing = Texts(texts=["abcdefgh", "abcdefgh,", "abcdefgha"]), plain(4, bos="none")
    assert len(tokenised(tmp_path, source, packing, 8, vocabulary=41).contexts) == 2
    said = r"document doc 1 holds token 41 \(','\), and the model's embedding has only 41 rows"
    with pytest.raises(UserError, match=said):
        tokenised(tmp_path, source, packing, 9, vocabulary=41)


def test_what_was_read_of_a_lost_stream_is_packed_and_its_whole_ranges_stay(tmp_path: Path) -> None:
    packing, lost = plain(8), Texts(texts=STORIES[:40], ends=True)
    stored = tokenised(tmp_path, lost, packing, 3300, multiple=4)
    read = pack(Texts(texts=STORIES[:40]), tokenizer(), packing, TRAIN, 1, multiple=1000)
    whole_units = len(read.contexts) // 4 * 4
    assert stored.lost is not None
    assert_same_text(
        stored, PackedTokens(read.contexts[:whole_units], read.keep[:whole_units], read.starts, read.names, 8)
    )
    again = Counting()
    whole = tokenised(tmp_path, Texts(texts=STORIES), packing, 3300, tokenizer=again)
    assert_same_text(whole, pack(Texts(texts=STORIES), tokenizer(), packing, TRAIN, 3300))
    assert again.documents < 60
    with pytest.raises(StreamLost, match="the stream broke off"):
        tokenised(tmp_path / "short", Texts(texts=STORIES[:1], ends=True), packing, 3300, multiple=1000)


# The stage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def test_another_site_dtype_and_packing_never_tokenise_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_stories(tmp_path / "stories.jsonl", range(40))
    words = Counting()
    monkeypatch.setattr(lm, "load_tokenizer", lambda model_cfg: words)
    store = harvest(config(model, text, tmp_path / "cache"))
    assert words.documents == 40
    assert harvest(config(model, text, tmp_path / "cache", "sites=[attn_out.0]", "tokens=400")).path == store.path
    harvest(config(model, text, tmp_path / "cache", "model.dtype=bfloat16"))
    harvest(config(model, text, tmp_path / "cache", "packing.context=8", "packing.bos=context"))
    assert words.documents == 40
    assert len(list((tmp_path / "cache").glob("tiny-*"))) == 3
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    harvest(config(model, write_stories(text, range(41)), tmp_path / "cache", "packing.context=8", "packing.bos=none"))
    assert words.documents == 81


def test_a_store_without_stored_tokens_is_extended(model: Path, tmp_path: Path) -> None:
    """As those are that were made before tokens were stored."""
    text = write_stories(tmp_path / "stories.jsonl", range(40))
    old = harvest(config(model, text, tmp_path / "old"))
    (tmp_path / "old" / "tokens").rename(tmp_path / "away")
    more = ("tokens=600", "heldout_tokens=100", "sites=[resid_post.1,mlp_out.2]")
    assert harvest(config(model, text, tmp_path / "old", *more)).path == old.path
    whole = harvest(config(model, text, tmp_path / "new", *more))
    assert contents(old.path) == contents(whole.path)


# Slow


@pytest.mark.slow
def test_killed_processes_leave_what_one_alone_makes(tmp_path: Path) -> None:
    """Two processes at a time, killed by SIGKILL once a few more files are there, until two end by themselves."""
    rng, killed, cut = random.Random(0), 0, tmp_path / "cut"
    worker = [sys.executable, "-m", "tests.helpers.tokens", str(cut)]

    def n_files() -> int:
        return sum(len(files) for _, _, files in os.walk(cut))

    for kills in (2, 1, 2, 0):
        more = n_files() + rng.randint(1, 4)
        processes = [subprocess.Popen(worker, cwd=ROOT) for _ in range(2)]
        while kills and n_files() < more and any(process.poll() is None for process in processes):
            time.sleep(0.005)
        for process in processes[:kills]:
            process.kill()
        codes = [process.wait() for process in processes]
        assert set(codes) <= {0, -signal.SIGKILL}
        killed += codes.count(-signal.SIGKILL)
    assert killed >= 2
    tokenised(tmp_path / "alone", KILLED_TEXT, KILLED_PACKING, KILLED_ROWS)
    assert contents(cut) == contents(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [None, 0])
def test_memory_is_flat_for_a_text_of_any_size(tmp_path: Path, shuffle: int | None) -> None:
    class Bytes(Counting):
        """A token a byte; a real tokenizer's memory is its own."""

        def __call__(self, texts: Any, **options: Any) -> Any:
            return {"input_ids": [[byte % 40 for byte in text.encode()] for text in texts]}

    class Many(Texts):
        documents_: int = 0

        def documents(self) -> Iterator[Document]:
            for number in range(self.documents_):
                text = f"{number:08d}" * 60
                yield Document(f"doc {number}", text, text)

    def peak(documents: int) -> int:
        sizes = RangeSizes(first=100_000, most=100_000)
        store = store_in(tmp_path / str(documents), sizes)
        tokeniser = Tokeniser(store, Many(documents_=documents), Bytes(), plain(64, shuffle=shuffle), quiet=True)
        tracemalloc.start()
        text = tokeniser.text(TRAIN, documents * 450)
        n_rows = sum(int(text.keep[at : at + 64].sum()) for at in range(0, text.n_contexts, 64))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_rows >= documents * 450
        return most

    short, long = peak(2_000), peak(20_000)
    # 8.6 million characters and tokens more; a range's own are a megabyte.
    assert long - short < 200_000
