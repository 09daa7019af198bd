"""Documents -> contexts of a fixed length: the packing rule, in one place.

A split's documents become one token stream, cut into contexts of T tokens; what is left at the end is dropped, so
nothing is padded. Where a token lies depends on text, tokenizer and packing, never on how many are wanted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from harvest.disk_arrays import DiskArray, DiskStrings
from harvest.documents import HELDOUT, Document, TextSource, split_of, unique

BOS_RULES = ("context", "document", "none")
ENCODE_AT_ONCE = 64  # documents handed to the tokenizer together


@dataclass(frozen=True)
class Packing:
    """How documents become contexts.

    context: tokens T of a context. bos: a BOS token before each `context`, before each `document`, or `none`.
    separator: an EOS token after each document. keep_special: whether rows of special tokens are harvested too.
    shuffle: a seed that orders the documents by sha256(seed, key), or None for the source's order.
    heldout: fraction of the documents held out.
    """

    context: int
    bos: str
    separator: bool
    keep_special: bool = False
    shuffle: int | None = None
    heldout: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.context, int) or self.context < 2:
            raise UserError(f"packing.context={self.context} must be a whole number of tokens, 2 or more")
        if self.bos not in BOS_RULES:
            raise UserError(f"packing.bos={self.bos} is unknown: choose one of {', '.join(BOS_RULES)}")
        for name in ("separator", "keep_special"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"packing.{name}={getattr(self, name)} must be true or false")
        if self.shuffle is not None and not isinstance(self.shuffle, int):
            raise UserError(f"packing.shuffle={self.shuffle} must be a whole number or null")
        if not isinstance(self.heldout, int | float) or not 0 <= self.heldout < 1:
            raise UserError(f"packing.heldout={self.heldout} must be a fraction, 0 or more and below 1")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Packing:
        """From the configuration's group `packing`, or a manifest's; UserError for a key unknown or missing."""
        fields = dataclasses.fields(cls)
        if unknown := sorted(set(settings) - {known.name for known in fields}):
            raise UserError(f"packing.{unknown[0]} is unknown: packing takes {', '.join(f.name for f in fields)}")
        for needed in fields:
            if needed.default is dataclasses.MISSING and needed.name not in settings:
                raise UserError(f"packing.{needed.name} is missing: set it")
        return cls(**settings)


@dataclass(frozen=True)
class PackedTokens:
    """Contexts of one split: `contexts` [n, T] token ids, `keep` [n, T] whether the token's row is harvested.

    starts, names: where in the stream each document begins, and its name; stride: tokens of the stream in a context.
    Of a long text all of these are in files (harvest/disk_arrays.py), and so in memory as far as the system likes.
    """

    contexts: NDArray[np.int32]
    keep: NDArray[np.bool_]
    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    names: Sequence[str] | DiskStrings = ()
    stride: int = 1

    def document(self, sequence: int, position: int) -> str:
        """The name of the document that token `position` of context `sequence` belongs to."""
        within = position - (self.contexts.shape[1] - self.stride)
        at = int(np.searchsorted(self.starts, sequence * self.stride + max(within, 0), side="right")) - 1
        return self.names[at] if len(self.names) else "unknown"


def special_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that stand for no text: BOS, EOS, padding and their like, the unknown token not counted."""
    ids = set(tokenizer.all_special_ids)
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return sorted(ids - {tokenizer.unk_token_id} | (marks & ids))


def check_tokenizer(tokenizer: Any, packing: Packing) -> None:
    """Refuse a packing that asks for tokens the tokenizer does not have."""
    if packing.bos != "none" and tokenizer.bos_token_id is None:
        raise UserError(f"packing.bos={packing.bos}, but this tokenizer has no BOS token: set packing.bos=none")
    if packing.separator and tokenizer.eos_token_id is None:
        raise UserError("packing.separator=true, but this tokenizer has no EOS token: set packing.separator=false")


def ordered(source: TextSource, packing: Packing, split: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each unique document of a split, as they are packed; a shuffle keeps them in temporary files."""
    mine = (doc for doc in unique(source.documents()) if split_of(doc.key, packing.heldout) == split)
    if packing.shuffle is None:
        return ((doc.name, doc.text) for doc in mine)
    return _shuffled(mine, packing.shuffle)


def _shuffled(documents: Iterable[Document], seed: int) -> Iterator[tuple[str, str]]:
    """By sha256(seed, key), compared as bytes."""
    names, texts, ranks = DiskStrings(), DiskStrings(), DiskArray()
    for doc in documents:
        names.append(doc.name)
        texts.append(doc.text)
        ranks.write(hashlib.sha256(f"{seed}:{doc.key}".encode("utf-8", "surrogatepass")).digest())
    words = ranks.array(">u8", len(names), 4)
    for index in np.lexsort(words.T[::-1]):  # of lexsort's keys the last one counts first
        yield names[index], texts[index]


def encoded(
    documents: Iterable[tuple[str, str]], tokenizer: Any, packing: Packing
) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """(name, tokens) of each document, with the BOS and EOS tokens that stand at its ends."""
    head = [tokenizer.bos_token_id] if packing.bos == "document" else []
    tail = [tokenizer.eos_token_id] if packing.separator else []
    documents = iter(documents)
    while batch := list(islice(documents, ENCODE_AT_ONCE)):
        texts = [text for _, text in batch]
        # verbose=False: a document longer than the model's context is no mistake here, it is cut.
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for (name, _), tokens in zip(batch, ids, strict=True):
            yield name, np.array([*head, *tokens, *tail], np.int32)


class _Cutter:
    """Cuts the stream into contexts as it comes, and remembers where documents begin."""

    def __init__(self, tokenizer: Any, packing: Packing) -> None:
        self.head = [tokenizer.bos_token_id] if packing.bos == "context" else []
        self.context, self.stride = packing.context, packing.context - len(self.head)
        self.length = 0
        self.starts, self.names = DiskArray(), DiskStrings()

    def blocks(self, documents: Iterable[tuple[str, NDArray[np.int32]]]) -> Iterator[NDArray[np.int32]]:
        """[n, T] whole contexts, n of 1 or more."""
        waiting: list[NDArray[np.int32]] = []
        for name, tokens in documents:
            self.starts.write(np.array([self.length], np.int64))
            self.names.append(name)
            self.length += len(tokens)
            waiting.append(tokens)
            if sum(map(len, waiting)) >= self.stride:
                stream = np.concatenate(waiting)
                whole = len(stream) // self.stride
                waiting = [stream[whole * self.stride :]]
                cut = stream[: whole * self.stride].reshape(whole, self.stride)
                head = np.tile(np.array(self.head, np.int32), (whole, 1))
                yield np.concatenate([head, cut], axis=1)


def pack(
    source: TextSource, tokenizer: Any, packing: Packing, split: str, rows: int, *, multiple: int = 1
) -> PackedTokens:
    """The first contexts of a split that hold at least `rows` kept rows.

    Their number is rounded up to a `multiple` where the text goes on that far, and is all there is where it does not.
    Raises UserError where the text has fewer rows than asked, saying how many there are.
    """
    assert rows > 0 and multiple > 0
    check_tokenizer(tokenizer, packing)
    special = np.array(special_ids(tokenizer), np.int32)
    cutter = _Cutter(tokenizer, packing)
    contexts, keeps = DiskArray(), DiskArray()
    count, kept, goal = 0, 0, None
    for block in cutter.blocks(encoded(ordered(source, packing, split), tokenizer, packing)):
        keep = np.ones_like(block, np.bool_) if packing.keep_special else ~np.isin(block, special)
        running = kept + np.cumsum(keep.sum(1))
        if goal is None and running[-1] >= rows:
            needed = count + int(np.searchsorted(running, rows)) + 1
            goal = -(-needed // multiple) * multiple
        contexts.write(block)
        keeps.write(keep)
        count, kept = count + len(block), int(running[-1])
        if goal is not None and count >= goal:
            break
    if goal is None:
        raise UserError(_too_short(source, packing, split, rows, kept))
    shape = min(goal, count), packing.context
    starts = cutter.starts.array(np.int64, len(cutter.names))
    return PackedTokens(
        contexts.array(np.int32, *shape), keeps.array(np.bool_, *shape), starts, cutter.names, cutter.stride
    )


def _too_short(source: TextSource, packing: Packing, split: str, rows: int, kept: int) -> str:
    setting = "heldout_tokens" if split == HELDOUT else "tokens"
    has = f"{kept:,} rows in whole contexts of {packing.context} tokens" if kept else "no whole context"
    return (
        f"{setting}={rows:,} is more than the {source.kind} text's {split} split holds ({has}): "
        f"ask for fewer, or give more text"
    )
