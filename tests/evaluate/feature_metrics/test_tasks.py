"""Tasks: what each kind answers, worked by hand, and the sentences for a file that cannot be read as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.base.cli import CONF
from data.base.errors import UserError
from evaluate.feature_metrics.tasks import TASK_KINDS, UNKNOWN, TokenTexts, answers, load_tasks
from harvest.packing import PackedTokens

WORDS = ["<s>", "def", " f", "(", "x", ")", ":", "\n", "  # ", "a 1"]


class Spoken:
    """A tokenizer of ten tokens whose decoder, like a sentence piece one, drops a text's first space."""

    def __len__(self) -> int:
        return len(WORDS)

    def decode(self, ids: list[int]) -> str:
        return "".join(WORDS[i] for i in ids).removeprefix(" ")


@pytest.fixture
def texts() -> TokenTexts:
    return TokenTexts(Spoken())


@pytest.fixture
def packed() -> PackedTokens:
    """Two contexts of a BOS and 4 tokens; document a begins at stream token 0, b at 5."""
    contexts = np.array([[0, 1, 2, 3, 4], [0, 5, 6, 7, 8]], np.int32)
    return PackedTokens(contexts, contexts > 0, np.array([0, 5]), ["a", "b"], stride=4)


def asked(path: Path, text: str, texts: TokenTexts, packed: PackedTokens, sequence: int = 0) -> list[int]:
    (path / "tasks.yaml").write_text(text)
    (row,) = answers(load_tasks(path / "tasks.yaml"), texts, packed, sequence).tolist()
    return row


def test_texts_keep_their_leading_space(texts: TokenTexts) -> None:
    assert [texts[i] for i in range(len(WORDS))] == WORDS


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token: '^ '", [0, 0, 1, 0, 0]),
        ("next: '^ '", [0, 1, 0, 0, UNKNOWN]),
        ("previous: '^ '", [UNKNOWN, 0, 0, 1, 0]),
        ("span: 'f.x'", [0, 0, 1, 1, 1]),
        ("span: '(?<=e)f'", [0, 1, 0, 0, 0]),
        ("position: [1, 3]", [0, 1, 1, 0, 0]),
    ],
)
def test_kinds_worked_by_hand(
    kind: str, expected: list[int], tmp_path: Path, texts: TokenTexts, packed: PackedTokens
) -> None:
    assert asked(tmp_path, f"- {{name: it, {kind}}}", texts, packed) == expected


def test_places_in_a_document_go_on_over_contexts(tmp_path: Path, texts: TokenTexts, packed: PackedTokens) -> None:
    # Context 1 holds stream tokens 4 (of a), 5, 6, 7 (of b, its 0th to 2nd) behind its BOS.
    assert asked(tmp_path, "- {name: it, document: [0, 2]}", texts, packed, 1) == [0, 0, 1, 1, 0]


def test_labels_are_of_documents(tmp_path: Path, texts: TokenTexts, packed: PackedTokens) -> None:
    (tmp_path / "l.jsonl").write_text('{"document": "b", "label": true}\n')
    got = asked(tmp_path, "- {name: it, labels: l.jsonl}", texts, packed, 1)
    assert got == [UNKNOWN, UNKNOWN, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "is no list of tasks"),
        ("- {name: it}", "write a name and one of token, next"),
        ("- {name: it, token: a, span: b}", "write a name and one of"),
        ("- {name: it, token: '('}", "has no regular expression"),
        ("- {name: it, position: [1]}", "two whole numbers"),
        ("- {name: it, labels: gone.jsonl}", "gone.jsonl cannot be read"),
        ("- {name: it, token: a}\n- {name: it, token: b}", "several tasks named 'it'"),
        ("- [", "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        load_tasks(tmp_path / "tasks.yaml")


def test_the_projects_own_list_can_be_read() -> None:
    tasks: list[Any] = load_tasks(CONF / "probes.yaml")
    assert len(tasks) > 40 and {task.kind for task in tasks} == set(TASK_KINDS) - {"labels"}
