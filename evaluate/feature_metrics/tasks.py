"""Binary questions about a token, answered from the text alone; the list is a YAML file.

A task has a name and one of
- `token`, `next`, `previous`: a regular expression, looked for in the text of the token, or the one after or before it;
- `span`: a regular expression over the text of the context, one of whose matches covers a part of the token;
- `position`, `document`: [first, end) among the context's positions, or among the tokens since the document began;
- `labels`: a JSON-lines file of {"document": name, "label": true or false}, for all tokens of the documents named.
Where a task has no answer (no next token, a document without a label) the token takes no part in it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from evaluate.documents import Documents
from harvest.packing import PackedTokens

Answers = NDArray[np.int8]  # 1, 0, or UNKNOWN
UNKNOWN = -1
NEIGHBOURS = {"token": 0, "next": 1, "previous": -1}
TASK_KINDS = (*NEIGHBOURS, "span", "position", "document", "labels")


@dataclass(frozen=True)
class Task:
    """One question: `kind` of TASK_KINDS and what it asks for, a pattern, a range (first, end) or labels by
    document."""

    name: str
    kind: str
    asks: Any


def load_tasks(path: Path) -> list[Task]:
    """Read the tasks of a YAML file, which may hold plain values only; UserError for what cannot be one."""
    import yaml  # type: ignore[import-untyped]

    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"feature_metrics_with.tasks={path} cannot be read ({reason}): name a YAML file of tasks"
        ) from None
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"feature_metrics_with.tasks={path} is no list of tasks: each is a name and one of {', '.join(TASK_KINDS)}"
        )
    tasks = [_task(path, entry) for entry in entries]
    names = [task.name for task in tasks]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{path} has several tasks named {min(twice)!r}: give each a name of its own")
    return tasks


def _task(path: Path, entry: Any) -> Task:
    kinds = [kind for kind in TASK_KINDS if isinstance(entry, dict) and kind in entry]
    if len(kinds) != 1 or set(entry) != {"name", kinds[0]} or not isinstance(entry["name"], str):
        raise UserError(f"{path} has the task {entry!r}: write a name and one of {', '.join(TASK_KINDS)}")
    (kind,) = kinds
    name, question = entry["name"], entry[kind]
    if kind in ("position", "document"):
        is_range = isinstance(question, list) and len(question) == 2 and all(type(end) is int for end in question)
        if not is_range:
            raise UserError(f"task {name!r} of {path} has {kind}={question}: write [first, end) as two whole numbers")
        return Task(name, kind, (question[0], question[1]))
    if not isinstance(question, str):
        raise UserError(f"task {name!r} of {path} has {kind}={question}: write a text in quotes")
    if kind == "labels":
        return Task(name, kind, _labels(path.parent / question))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python will read otherwise some day, such as [[
            return Task(name, kind, re.compile(question, re.MULTILINE))
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise UserError(f"task {name!r} of {path} has no regular expression ({error}): fix {question!r}") from None


def _labels(path: Path) -> dict[str, bool]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        labels = {row["document"]: row["label"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} cannot be read ({error}): each line is {{"document": name, "label": true}}') from None
    if not all(isinstance(label, bool) for label in labels.values()):
        raise UserError(f"{path} has labels that are not true or false: write one of the two")
    return labels


class TokenTexts:
    """The text of each token, its leading space included, as it stands after another token; decoded once each."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.known = tokenizer, dict[int, str]()
        # A decoder may drop a text's first space, so a token is decoded behind another and that one taken off.
        plain = (i for i in range(len(tokenizer)) if re.fullmatch("[a-z]+", tokenizer.decode([i])))
        self.anchor = next(plain, None)

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            alone = self.tokenizer.decode([token])
            if self.anchor is not None:
                head, both = self.tokenizer.decode([self.anchor]), self.tokenizer.decode([self.anchor, token])
                alone = both[len(head) :] if both.startswith(head) else alone
            self.known[token] = alone
        return self.known[token]


def _spans(pattern: re.Pattern[str], texts: Sequence[str]) -> Answers:
    """Mark the tokens of which a match over the joined texts covers a part."""
    ends = np.cumsum([len(text) for text in texts])
    covered = np.zeros(int(ends[-1]) + 1, np.int64)
    for match in pattern.finditer("".join(texts)):
        covered[match.start() : match.end()] = 1
    running = np.concatenate([[0], np.cumsum(covered)])
    answers: Answers = (running[ends] > running[ends - [len(text) for text in texts]]).astype(np.int8)
    return answers


def _shifted(matches: Callable[[str], Any], texts: Sequence[str], by: int) -> Answers:
    own = np.array([bool(matches(text)) for text in texts], np.int8)
    answers = np.full(len(texts), UNKNOWN, np.int8)
    if by > 0:
        answers[:-by] = own[by:]
    elif by < 0:
        answers[-by:] = own[:by]
    else:
        answers[:] = own
    return answers


def answers(tasks: Sequence[Task], texts: TokenTexts, packed: PackedTokens, sequence: int) -> Answers:
    """Return [tasks, T]: what each task answers for each token of a context."""
    ids = packed.contexts[sequence]
    words, context = [texts[int(token)] for token in ids], len(ids)
    position = np.arange(context)
    documents = Documents.of(packed)
    at = documents.positions(range(sequence, sequence + 1))[0]
    document = documents.numbers(range(sequence, sequence + 1))[0]
    since = at - packed.starts[document] if len(packed.starts) else at
    rows = np.empty((len(tasks), context), np.int8)
    for row, task in zip(rows, tasks, strict=True):
        if task.kind in NEIGHBOURS:
            row[:] = _shifted(task.asks.search, words, NEIGHBOURS[task.kind])
        elif task.kind == "span":
            row[:] = _spans(task.asks, words)
        elif task.kind == "labels":
            names = {number: packed.names[number] for number in set(document.tolist())}
            row[:] = [task.asks.get(names[number], UNKNOWN) for number in document.tolist()]
        else:
            counted = position if task.kind == "position" else since
            row[:] = (counted >= task.asks[0]) & (counted < task.asks[1])
    return rows
