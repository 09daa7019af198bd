"""python -m pytest tests/harvest/test_chat.py: chats by the tokenizer's own template, and whose rows are stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.base.errors import UserError
from data.store.manifest import HELDOUT, TRAIN
from evaluate.inputs import open_text
from harvest import lm
from harvest.chat import Chat, rendered
from harvest.documents import DatasetText, FilesText
from harvest.packing import PackedTokens, Packing, pack
from harvest.run import harvest
from tests.helpers.corpus import LETTERS, config, ids, save_model, story, tokenizer

TEMPLATE = "{% for m in messages %}{{ '</s>' + m['role'] + ' ' + m['content'] + '.' }}{% endfor %}"
TRIMMED = TEMPLATE.replace("m['content']", "m['content'] | trim")
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so be it"}]
EOS = 1


def chatting(template: str | None = TEMPLATE) -> Any:
    one = tokenizer()
    one.chat_template = template
    return one


def write(path: Path, *chats: Any) -> Path:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


def packed(path: Path, keep: str, template: str | None = TEMPLATE, **packing: Any) -> PackedTokens:
    """All whole contexts of the chats in a file, by default contexts of 5 and nothing added."""
    source = FilesText(paths=[str(path)], field="messages", chat=keep)  # type: ignore[arg-type]
    rule = Packing.of({"context": 5, "bos": "none", "shuffle": None, "heldout": 0.0, **packing})
    return pack(source, chatting(template), rule, TRAIN, 1, multiple=100)


def test_a_chat_is_what_the_template_says(tmp_path: Path) -> None:
    found = packed(write(tmp_path / "chats.jsonl", TALK), "all")
    whole = [EOS, *ids("user hi."), EOS, *ids("assistant so be it.")]
    assert found.contexts.ravel().tolist() == whole[: len(whole) // 5 * 5]
    assert (found.keep == (found.contexts != EOS)).all()


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMED])
def test_only_the_assistants_words_are_stored(tmp_path: Path, template: str) -> None:
    """Its name in the template, its end and what a user says in the same words are not."""
    talk = [{"role": "user", "content": "assistant so be it"}, {"role": "assistant", "content": " so be it "}, *TALK]
    found = packed(write(tmp_path / "chats.jsonl", talk), "assistant", template)
    letters = [LETTERS[token - 3] for token in found.contexts[found.keep].tolist()]
    once = " so be it " if template == TEMPLATE else "so be it"
    assert "".join(letters) == (once + "so be it")[: len(letters)] and len(letters) > len(once)


def test_a_mask_follows_its_tokens_through_every_packing(tmp_path: Path) -> None:
    """Letters that the assistant alone uses are stored, all of them, and no other letter is."""
    chats = [[{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "z" * n}] for n in range(1, 30)]
    path = write(tmp_path / "chats.jsonl", *chats)
    (z,) = ids("z")
    for bos in ("context", "document", "none"):
        for context in (3, 8, 50):
            found = packed(path, "assistant", bos=bos, context=context, separator=True)
            assert (found.keep == (found.contexts == z)).all() and found.keep.any()


def test_a_template_with_its_own_bos_gets_no_second(tmp_path: Path) -> None:
    found = packed(write(tmp_path / "chats.jsonl", TALK), "all", "<s>" + TEMPLATE, bos="document")
    assert found.contexts[0].tolist() == [0, EOS, *ids("use")]


@pytest.mark.parametrize(
    ("rows", "keep", "template", "sentence"),
    [
        ([TALK], "all", None, "no chat template"),
        ([[{"role": "user"}]], "all", TEMPLATE, r"chats\.jsonl:1 has a list under 'messages', not a chat's messages"),
        (["hello"], "all", TEMPLATE, r"chats\.jsonl:1 has .* under 'messages', not a chat's messages"),
        ([TALK], "assistant", TEMPLATE.replace("m['content']", "m['content'] | upper"), "changes what a message says"),
        ([TALK], "all", "{{ raise_exception('roles must alternate') }}", r"no chat for .* template \(roles must alt"),
    ],
)
def test_what_is_no_chat_is_one_sentence(
    tmp_path: Path, rows: list[Any], keep: str, template: str | None, sentence: str
) -> None:
    path = write(tmp_path / "chats.jsonl", *rows)
    with pytest.raises(UserError, match=sentence):
        packed(path, keep, template)


def test_a_chat_without_the_setting_says_which_to_set(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", TALK)
    with pytest.raises(UserError, match=r"set text\.chat=all, or text\.chat=assistant"):
        list(FilesText(paths=[str(path)], field="messages").documents())
    (tmp_path / "plain.txt").write_text("hello")
    with pytest.raises(UserError, match=r"plain\.txt is a text, no chats as text\.chat=all needs"):
        FilesText(paths=[str(tmp_path / "plain.txt")], chat="all").check()


def test_text_without_chats_is_identified_as_before_there_was_the_setting(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("hello")
    assert "chat" not in FilesText(paths=[str(tmp_path / "plain.txt")]).identity()
    assert "chat" not in DatasetText(name="some/where", revision="0" * 40).identity()
    path = write(tmp_path / "chats.jsonl", TALK)
    hashes = [FilesText(paths=[str(path)], field="messages", chat=keep).identity() for keep in ("all", "assistant")]
    assert [one["chat"] for one in hashes] == ["all", "assistant"] and hashes[0]["sha256"] != hashes[1]["sha256"]


def test_a_harvest_of_chats_stores_and_scores_the_assistants_rows(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    chatting().save_pretrained(model)
    chats = [[{"role": "user", "content": "say"}, {"role": "assistant", "content": story(n)}] for n in range(60)]
    path = write(tmp_path / "chats.jsonl", *chats)
    asked = config(model, path, tmp_path / "cache", "text.field=messages", "text.chat=assistant")
    store = harvest(asked)
    assert store.rows(TRAIN, "resid_post.1") >= 200
    text = open_text(store, {"tokens": 40, "device": "cpu", "device_map": None})
    kept = text.packed.contexts[text.packed.keep]
    assert 0 < text.packed.keep.mean() < 0.95 and np.isin(kept, ids(LETTERS)).all()
    assert store.rows(HELDOUT, "resid_post.1") > 0

    chatting(TRIMMED).save_pretrained(model)  # another template: another store, and no score on this one
    with pytest.raises(UserError, match="chat_template"):
        open_text(store, {"tokens": 40, "device": "cpu", "device_map": None})
    with pytest.raises(UserError, match="chat_template"):
        harvest(asked)


def test_smollm2_instruct_by_its_own_template(smollm2: Any) -> None:
    """A real template, which puts a system prompt before the first message and begins with the BOS."""
    tokens = lm.load_tokenizer({"name": smollm2})
    talk = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "It is Paris."},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "assistant"},
    ]
    whole = tokens.apply_chat_template(talk, tokenize=False)
    for keep, words in (("assistant", "It is Paris.assistant"), ("all", whole)):
        token_ids, wanted = rendered(Chat(talk, keep), tokens, "it")  # type: ignore[arg-type]
        assert token_ids[0] == tokens.bos_token_id
        assert tokens.decode(np.array(token_ids)[wanted].tolist()) == words
