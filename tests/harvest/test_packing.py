"""python -m pytest tests/harvest/test_packing.py"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from data.base.errors import UserError, to_sentence
from harvest import disk_arrays as spool
from harvest.documents import HELDOUT, TRAIN, Document, TextSource, split_of
from harvest.packing import PackedTokens, Packing, bos_id, check_tokenizer, pack, special_ids
from harvest.tokenizer import TokenIds
from tests.helpers.corpus import ROOT, ids, story, tokenizer

TOKENIZER = tokenizer()
A, B, C, D, E, F = ids("abcdef")
BOS, EOS = 0, 1


class Texts(TextSource):
    """Documents given in the test."""

    kind: str = "files"
    texts: list[str] = Field(default_factory=list)

    def check(self) -> None: ...

    def documents(self) -> Iterator[Document]:
        return (Document(f"doc {i}", text, text) for i, text in enumerate(self.texts))


def plain(context: int, bos: str = "none", separator: bool = False, **more: Any) -> Packing:
    return Packing.of({"context": context, "bos": bos, "separator": separator, "shuffle": None, "heldout": 0.0, **more})


@pytest.mark.parametrize(
    ("packing", "contexts"),
    [
        (plain(2), [[A, B], [C, D], [E, F]]),
        (plain(4), [[A, B, C, D]]),
        (plain(3, "context"), [[BOS, A, B], [BOS, C, D], [BOS, E, F]]),
        (plain(3, "document"), [[BOS, A, B], [C, BOS, D], [E, BOS, F]]),
        (plain(3, separator=True), [[A, B, C], [EOS, D, E], [EOS, F, EOS]]),
        (plain(4, "document", True), [[BOS, A, B, C], [EOS, BOS, D, E], [EOS, BOS, F, EOS]]),
        (plain(4, "context", True), [[BOS, A, B, C], [BOS, EOS, D, E], [BOS, EOS, F, EOS]]),
    ],
)
def test_each_rule_by_hand(packing: Packing, contexts: list[list[int]]) -> None:
    found = pack(Texts(texts=["abc", "de", "f"]), TOKENIZER, packing, TRAIN, 1, multiple=100)
    assert found.contexts.tolist() == contexts
    assert found.contexts.dtype == np.int32
    assert (found.keep == ~np.isin(found.contexts, [BOS, EOS])).all()


def test_special_tokens_are_kept_when_asked_for_and_wherever_they_come_from() -> None:
    texts = Texts(texts=["ab</s>c"])  # written in the text itself, this tokenizer reads it as its EOS
    assert pack(texts, TOKENIZER, plain(4), TRAIN, 1).keep.tolist() == [[True, True, False, True]]
    kept = pack(Texts(texts=["abc"]), TOKENIZER, plain(3, "document", True, keep_special=True), TRAIN, 1)
    assert kept.keep.all()


def test_the_unknown_token_is_text() -> None:
    assert special_ids(TOKENIZER) == [BOS, EOS]
    found = pack(Texts(texts=["aéb"]), TOKENIZER, plain(3), TRAIN, 3)
    assert found.contexts.tolist() == [[A, 2, B]]
    assert found.keep.all()


STORIES = [story(n) for n in range(60)]
PACKINGS = st.builds(
    plain,
    st.integers(2, 40),
    st.sampled_from(["context", "document", "none"]),
    st.booleans(),
    shuffle=st.sampled_from([None, 0, 7]),
    heldout=st.sampled_from([0.0, 0.4]),
)


@settings(deadline=None, max_examples=40)
@given(PACKINGS, st.integers(1, 900), st.integers(1, 7))
def test_enough_contexts_and_no_more_and_the_first_of_more(packing: Packing, rows: int, multiple: int) -> None:
    whole = pack(Texts(texts=STORIES), TOKENIZER, packing, TRAIN, 1, multiple=10**6)
    some = pack(Texts(texts=STORIES), TOKENIZER, packing, TRAIN, rows, multiple=1)
    units = pack(Texts(texts=STORIES), TOKENIZER, packing, TRAIN, rows, multiple=multiple)
    assert some.keep.sum() >= rows > some.keep[:-1].sum()
    assert len(units.contexts) == min(-(-len(some.contexts) // multiple) * multiple, len(whole.contexts))
    for part in (some, units):
        assert (part.contexts == whole.contexts[: len(part.contexts)]).all()
        assert (part.keep == whole.keep[: len(part.keep)]).all()


@settings(deadline=None, max_examples=40)
@given(PACKINGS, st.sampled_from([TRAIN, HELDOUT]))
def test_contexts_spell_the_documents_of_the_split_in_order(packing: Packing, split: str) -> None:
    mine = [text for text in STORIES if split_of(text, packing.heldout) == split]
    if not mine:
        return
    if packing.shuffle is not None:
        mine.sort(key=lambda text: hashlib.sha256(f"{packing.shuffle}:{text}".encode()).digest())
    head, tail = [BOS] * (packing.bos == "document"), [EOS] * packing.separator
    stream = [token for text in mine for token in [*head, *ids(text), *tail]]
    found = pack(Texts(texts=STORIES), TOKENIZER, packing, split, 1, multiple=10**6)
    lead = packing.bos == "context"
    assert (found.contexts[:, :lead] == BOS).all()
    spelled = found.contexts[:, lead:].ravel().tolist()
    assert spelled == stream[: len(spelled)]
    assert len(stream) - len(spelled) < packing.context - lead  # nothing but a last part of a context is dropped


def test_a_token_is_traced_to_its_document() -> None:
    texts = Texts(texts=["abc", "de", "abcdef"])
    for packing in (plain(3, "context"), plain(3), plain(4, "document", True)):
        found = pack(texts, TOKENIZER, packing, TRAIN, 1, multiple=100)
        letters = {"doc 0": "abc", "doc 1": "de", "doc 2": "abcdef"}
        told = dict.fromkeys(letters, "")
        for sequence, position in np.argwhere(found.keep).tolist():
            token = found.contexts[sequence, position]
            told[found.document(sequence, position)] += "abcdef"[[A, B, C, D, E, F].index(token)]
        assert all(whole.startswith(told[name]) and told[name] for name, whole in letters.items()), told
    assert PackedTokens(found.contexts, found.keep).document(0, 0) == "unknown"


def test_seeds_give_other_orders_of_the_same_documents() -> None:
    def first(shuffle: int | None) -> list[list[int]]:
        packing = plain(8, shuffle=shuffle)
        return pack(Texts(texts=STORIES), TOKENIZER, packing, TRAIN, 1, multiple=10**6).contexts.tolist()

    assert first(0) == first(0) != first(1) != first(None)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [None, 0])
def test_memory_does_not_grow_with_the_text(shuffle: int | None) -> None:
    class Bytes:
        """A token a byte; a real tokenizer's memory is its own."""

        bos_token_id = eos_token_id = unk_token_id = 0
        all_special_ids: ClassVar[list[int]] = [0]

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [list(text.encode()) for text in texts]}

    class Counting(Texts):
        documents_: int = 0

        def documents(self) -> Iterator[Document]:
            for number in range(self.documents_):
                text = f"{number:08d}" * 500
                yield Document(f"doc {number}", text, text)

    def peak(documents: int) -> int:
        tracemalloc.start()
        found = pack(Counting(documents_=documents), Bytes(), plain(64, shuffle=shuffle), TRAIN, documents * 3900)
        assert found.document(0, 0).startswith("doc ")
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.contexts.size > documents * 3900
        return most

    short, long = peak(150), peak(600)
    # 1.8M tokens more, five bytes each; what is remembered of a document are its digest and its place.
    assert long - short < 450 * 500


def test_what_a_text_needs_beside_memory_is_gone_with_its_process(tmp_path: Path) -> None:
    code = """
import os, signal, tempfile
import numpy as np
from harvest.disk_arrays import DiskArray, DiskStrings
spool, texts = DiskArray(), DiskStrings()
spool.write(np.arange(1000))
texts.append("a")
assert spool.array(np.int64, 3).tolist() == [0, 1, 2] and texts[0] == "a"
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert ended.returncode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_texts_are_found_by_their_number() -> None:
    texts = spool.DiskStrings()
    given = ["", "a", "\n", "é\udc80", "", "the end"]
    for text in given:
        texts.append(text)
    assert [texts[i] for i in range(len(texts))] == given


def test_a_full_disk_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Full:
        def write(self, piece: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None: ...

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(OSError) as error:
        pack(Texts(texts=["abcdef"]), TOKENIZER, plain(3), TRAIN, 1)
    assert to_sentence(error.value) == f"the disk is full ({tmp_path}): free some space and run the same command again"


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(UserError, match=r"tokens=50 is more than the files text's train split holds \(6 rows in whole"):
        pack(Texts(texts=["abcdefa"]), TOKENIZER, plain(3), TRAIN, 50)
    with pytest.raises(UserError, match=r"heldout_tokens=1 is more than .* heldout split holds \(no whole context\)"):
        pack(Texts(texts=["abcdef"]), TOKENIZER, plain(3), HELDOUT, 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"context": 1}, r"packing\.context=1 is not allowed: it should be greater than or equal to 2"),
        ({"context": "long"}, r"packing\.context=long is not allowed"),
        ({"bos": "both"}, r"packing\.bos=both is not allowed: it should be 'context', 'document' or 'none'"),
        ({"separator": "yes"}, r"packing\.separator=yes is not allowed: it should be a valid boolean"),
        ({"shuffle": 0.5}, r"packing\.shuffle=0\.5 is not allowed"),
        ({"heldout": 1}, r"packing\.heldout=1 must be a fraction"),
        ({"heldout": float("nan")}, r"packing\.heldout=nan must be a fraction"),
        ({"bose": 1}, r"packing\.bose is no setting: did you mean packing\.bos\?"),
    ],
)
def test_a_wrong_packing_is_named(change: dict[str, Any], told: str) -> None:
    good = {"context": 8, "bos": "none", "separator": False}
    with pytest.raises(UserError, match=told):
        Packing.of({**good, **change}, "packing")


def test_the_held_out_fraction_is_recorded_as_it_was_given() -> None:
    """0 and 0.0 are two spellings in the identity of a store."""
    assert [str(Packing.of({"heldout": given}).model_dump()["heldout"]) for given in (0, 0.0)] == ["0", "0.0"]


def test_a_token_the_tokenizer_does_not_have_is_refused() -> None:
    bare = tokenizer()
    bare.bos_token = bare.eos_token = None
    check_tokenizer(bare, plain(4))
    with pytest.raises(UserError, match=r"no BOS token: set packing\.bos=none"):
        check_tokenizer(bare, plain(4, "document"))
    with pytest.raises(UserError, match=r"no EOS token: set packing\.separator=false"):
        check_tokenizer(bare, plain(4, separator=True))


# A BOS of choice


def with_turn(own_rule: bool = False) -> Any:
    """The tests' tokenizer with a special token <|turn|> (the highest id); own_rule: it puts that before each text."""
    from tokenizers.processors import TemplateProcessing

    more = tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    if own_rule:
        turn = more.convert_tokens_to_ids("<|turn|>")
        more.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|turn|> $A", pair=None, special_tokens=[("<|turn|>", turn)]
        )
    return more


def test_a_bos_by_name_stands_where_the_tokenizers_own_would() -> None:
    more = with_turn()
    turn = more.convert_tokens_to_ids("<|turn|>")
    by_document = pack(
        Texts(texts=["abc", "de"]), more, plain(3, "document", bos_token="<|turn|>"), TRAIN, 1, multiple=9
    )
    assert by_document.contexts.tolist() == [[turn, A, B], [C, turn, D]]
    assert (by_document.keep == (by_document.contexts != turn)).all()
    by_context = pack(Texts(texts=["abc"]), more, plain(3, "context", bos_token="<|turn|>"), TRAIN, 1, multiple=9)
    assert by_context.contexts.tolist() == [[turn, A, B]]
    bare = with_turn()
    bare.bos_token = None  # a tokenizer without one, such as Qwen's
    assert pack(Texts(texts=["abc"]), bare, plain(3, "context", bos_token="<|turn|>"), TRAIN, 1).contexts[0, 0] == turn


def test_auto_is_what_the_tokenizer_does_by_itself() -> None:
    ours = plain(3, "document", bos_token="auto")
    assert bos_id(tokenizer(), ours) is None
    assert pack(Texts(texts=["abc"]), tokenizer(), ours, TRAIN, 1).contexts.tolist() == [[A, B, C]]
    ruled = with_turn(own_rule=True)
    turn = ruled.convert_tokens_to_ids("<|turn|>")
    assert bos_id(ruled, ours) == turn != ruled.bos_token_id
    assert pack(Texts(texts=["abc"]), ruled, ours, TRAIN, 1).contexts.tolist() == [[turn, A, B]]
    assert bos_id(ruled, plain(3, bos_token="auto")) is None  # bos=none


def test_a_bos_that_is_no_special_token_is_refused() -> None:
    with pytest.raises(UserError, match=r"packing\.bos_token=a is no special token .*: choose one of <s>, </s>"):
        bos_id(tokenizer(), plain(4, "document", bos_token="a"))
    ids_only = TokenIds("it", {"bos_token_id": 0})
    assert bos_id(ids_only, plain(4, "document")) == 0
    with pytest.raises(UserError, match=r"packing\.bos_token=<s> needs a tokenizer"):
        bos_id(ids_only, plain(4, "document", bos_token="<s>"))


def test_a_packing_without_the_setting_is_identified_as_before_there_was_one() -> None:
    assert "bos_token" not in plain(4).identity() and plain(4, bos_token="auto").identity()["bos_token"] == "auto"
