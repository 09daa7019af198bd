"""Documents -> contexts of a fixed length: the packing rule, in one place.

A split's documents become one token stream, cut into contexts of T tokens; what is left at the end is dropped, so
nothing is padded. Where a token lies depends on text, tokenizer and packing, never on how many are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainValidator, Strict

from data.base.config import Flag, Settings, Whole
from data.base.errors import UserError
from data.base.records import Json
from data.store.manifest import HELDOUT
from harvest.disk_arrays import DiskArray, DiskStrings
from harvest.document_order import DocumentOrder
from harvest.encoding import encoded
from harvest.text_dataset import StreamLost
from harvest.text_source import TextSource, unique

_FEW_DOCUMENTS = 50  # below which a split is likely to be empty by chance


def _fraction(value: Any) -> int | float:
    """Keep a fraction as given: 0 and 0.0 are two spellings in a store's identity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"packing.heldout={value} must be a fraction, 0 or more and below 1")
    return value


class Packing(Settings):
    """How documents become contexts."""

    context: Whole = Field(default=256, ge=2)
    """Tokens T of a context."""
    bos: Literal["context", "document", "none"] = "document"
    """Where a BOS token stands: before each `context`, before each `document`, or nowhere."""
    bos_token: Annotated[str, Strict(), Field(min_length=1)] | None = None
    """Which token that is. null: the tokenizer's own BOS; `auto`: what the tokenizer itself puts before a text, none
    where it puts none; or a special token by name."""
    separator: Flag = False
    """Whether an EOS token stands after each document."""
    keep_special: Flag = False
    """Whether rows of special tokens are harvested too."""
    shuffle: Whole | None = 0
    """A seed that orders the documents by sha256(seed, key); null: the source's order."""
    heldout: Annotated[float, PlainValidator(_fraction)] = 0.1
    """Fraction of the documents held out."""

    def identity(self) -> Json:
        """Return what a store's identity records, without `bos_token` where it is null, as before that setting."""
        return {name: value for name, value in self.model_dump().items() if name != "bos_token" or value is not None}


class Sliced(Protocol):
    """Rows that are read by slices, from memory or from wherever they lie."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: slice, /) -> NDArray[Any]: ...


class PackedText(Protocol):
    """What a harvest asks of the contexts of a split; `PackedTokens` and `harvest.stored_text.StoredText` are such."""

    @property
    def contexts(self) -> Sliced: ...
    @property
    def keep(self) -> Sliced: ...
    @property
    def lost(self) -> StreamLost | None: ...
    def rows(self, contexts: slice) -> int: ...
    def document(self, sequence: int, position: int) -> str: ...


@dataclass(frozen=True)
class PackedTokens:
    """Contexts of one split: `contexts` [n, T] token ids, `keep` [n, T] whether the token's row is harvested.

    starts, names: where in the stream each document begins, and its name; stride: tokens of the stream in a context.
    Of a long text all of these are in files (harvest/disk_arrays.py), and so in memory as far as the system likes.
    lost: the error that ended a stream before there were as many as asked for.
    """

    contexts: NDArray[np.int32]
    keep: NDArray[np.bool_]
    starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    names: Sequence[str] | DiskStrings = ()
    stride: int = 1
    lost: StreamLost | None = None

    def rows(self, contexts: slice) -> int:
        """Count the kept rows of some contexts."""
        return int(self.keep[contexts].sum())

    def document(self, sequence: int, position: int) -> str:
        """Return the name of the document that token `position` of context `sequence` belongs to."""
        within = position - (self.contexts.shape[1] - self.stride)
        at = int(np.searchsorted(self.starts, sequence * self.stride + max(within, 0), side="right")) - 1
        return self.names[at] if len(self.names) else "unknown"


def special_ids(tokenizer: Any) -> list[int]:
    """Find the ids of tokens that stand for no text:
    BOS, EOS, padding and their like, the unknown token not counted."""
    ids = set(tokenizer.all_special_ids)
    marks = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return sorted((ids - {tokenizer.unk_token_id}) | (marks & ids) | set(added_special_ids(tokenizer)))


def added_special_ids(tokenizer: Any) -> list[int]:
    """Find the ids of tokens added with `special=true` that the tokenizer does not count among its own special
    tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {index for index, token in added.items() if token.special}
    return sorted(special - set(tokenizer.all_special_ids))


def bos_id(tokenizer: Any, packing: Packing) -> int | None:
    """Find the id of the token that stands for BOS, None where there is none; UserError for one it lacks."""
    name = packing.bos_token
    if packing.bos == "none":
        return None
    if name is None:
        if tokenizer.bos_token_id is None:
            raise UserError(
                f"packing.bos={packing.bos}, but this tokenizer has no BOS token: set packing.bos=none, or name a "
                "special token with packing.bos_token"
            )
        return int(tokenizer.bos_token_id)
    if not tokenizer.get_vocab():
        raise UserError(f"packing.bos_token={name} needs a tokenizer, and this model has none: leave it null")
    if name == "auto":
        return _own_bos(tokenizer)
    names = tokenizer.convert_ids_to_tokens(special_ids(tokenizer))
    if name not in names:
        raise UserError(
            f"packing.bos_token={name} is no special token of this tokenizer: choose one of {', '.join(names[:20])}"
        )
    return int(tokenizer.convert_tokens_to_ids(name))


def _own_bos(tokenizer: Any) -> int | None:
    """Find what the tokenizer puts before a text unasked."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    own = tokenizer("a")["input_ids"]
    if own[: len(plain)] == plain:
        return None
    if own[1 : 1 + len(plain)] != plain:
        raise UserError("packing.bos_token=auto: this tokenizer puts several tokens before a text: name one of them")
    return int(own[0])


def check_tokenizer(tokenizer: Any, packing: Packing) -> None:
    """Refuse a packing that asks for tokens the tokenizer does not have."""
    bos_id(tokenizer, packing)
    if packing.separator and tokenizer.eos_token_id is None:
        raise UserError("packing.separator=true, but this tokenizer has no EOS token: set packing.separator=false")


@dataclass(frozen=True)
class _Stretch:
    """A document's part of the stream: its tokens with the BOS and EOS at its ends, which of them may be harvested."""

    name: str
    tokens: NDArray[np.int32]
    wanted: NDArray[np.bool_]


def _stretches(
    documents: Iterable[tuple[str, str]], tokenizer: Any, packing: Packing, vocabulary: int | None = None
) -> Iterator[_Stretch]:
    """Yield what each document is in the stream, with the BOS and EOS tokens that stand at its ends.

    A document that came as token ids, or as a chat whose template begins with a BOS, gets no second one. vocabulary:
    rows of the model's embedding, beyond which a token is refused (UserError).
    """
    bos = bos_id(tokenizer, packing)
    head = [bos] if packing.bos == "document" and bos is not None else []
    tail = [tokenizer.eos_token_id] if packing.separator else []
    for doc in encoded(documents, tokenizer):
        lead = [] if doc.own and doc.ids[:1].tolist() == head else head
        tokens = np.array([*lead, *doc.ids, *tail], np.int32)
        if vocabulary is not None and len(tokens) and tokens.max() >= vocabulary:
            raise UserError(beyond_vocabulary(doc.name, int(tokens.max()), tokenizer, vocabulary))
        # The ends are special tokens, stored only where those are.
        yield _Stretch(doc.name, tokens, np.pad(doc.wanted, (len(lead), len(tail)), constant_values=True))


def beyond_vocabulary(document: str, token: int, tokenizer: Any, vocabulary: int) -> str:
    """Say that a document has a token which the model's embedding has no row for."""
    return (
        f"document {document} holds token {token} ({tokenizer.decode([token])!r}), and the model's embedding has only "
        f"{vocabulary:,} rows: leave such text out, or take the tokenizer that the model was trained with"
    )


class _Cutter:
    """Cuts the stream into contexts as it comes, and remembers where documents begin."""

    def __init__(self, tokenizer: Any, packing: Packing) -> None:
        bos = bos_id(tokenizer, packing)
        self.head = [bos] if packing.bos == "context" and bos is not None else []
        self.context, self.stride = packing.context, packing.context - len(self.head)
        self.length = 0
        self.starts, self.names = DiskArray(), DiskStrings()

    def blocks(self, documents: Iterable[_Stretch]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Whole contexts [n, T], n of 1 or more, and which of their rows may be harvested [n, T]."""
        tokens: list[NDArray[np.int32]] = []
        wanted: list[NDArray[np.bool_]] = []
        for doc in documents:
            self.starts.write(np.array([self.length], np.int64))
            self.names.append(doc.name)
            self.length += len(doc.tokens)
            tokens.append(doc.tokens)
            wanted.append(doc.wanted)
            if sum(map(len, tokens)) >= self.stride:
                block, left = self._cut(np.concatenate(tokens), np.array(self.head, np.int32))
                may_keep, left_wanted = self._cut(np.concatenate(wanted), np.ones(len(self.head), np.bool_))
                tokens, wanted = [left], [left_wanted]
                yield block, may_keep

    def _cut(self, stream: NDArray[Any], head: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Cut off the whole contexts of a stream, each behind the head; and what is left."""
        whole = len(stream) // self.stride
        cut = stream[: whole * self.stride].reshape(whole, self.stride)
        return np.concatenate([np.tile(head, (whole, 1)), cut], axis=1), stream[whole * self.stride :]


def pack(
    source: TextSource,
    tokenizer: Any,
    packing: Packing,
    split: str,
    rows: int,
    *,
    multiple: int = 1,
    vocabulary: int | None = None,
) -> PackedTokens:
    """Pack the first contexts of a split that hold at least `rows` kept rows.

    Their number is rounded up to a `multiple` where the text goes on that far, and is all there is where it does not.
    Of a stream that is lost on the way it is a multiple too, and `lost` says why there are no more. vocabulary: rows of
    the model's embedding. Raises UserError where the text has fewer rows than asked, saying how many there are.
    """
    assert rows > 0 and multiple > 0
    check_tokenizer(tokenizer, packing)
    special = np.array(special_ids(tokenizer), np.int32)
    cutter = _Cutter(tokenizer, packing)
    contexts, keeps = DiskArray(), DiskArray()
    count, n_kept, goal, lost = 0, 0, None, None
    try:
        texts = DocumentOrder(source, packing.shuffle, packing.heldout).texts(split)
        documents = _stretches(texts, tokenizer, packing, vocabulary)
        for block, may_keep in cutter.blocks(documents):
            keep = may_keep if packing.keep_special else may_keep & ~np.isin(block, special)
            running = n_kept + np.cumsum(keep.sum(1))
            if goal is None and running[-1] >= rows:
                needed = count + int(np.searchsorted(running, rows)) + 1
                goal = -(-needed // multiple) * multiple
            contexts.write(block)
            keeps.write(keep)
            count += len(block)
            n_kept = int(running[-1])
            if goal is not None and count >= goal:
                break
    except StreamLost as error:
        # Whole units alone: where the text ends one may be shorter, but the text has not ended here.
        goal, lost = count // multiple * multiple, error
        if not goal:
            raise
    if goal is None:
        raise UserError(too_short(source, packing, split, rows, n_kept))
    shape = min(goal, count), packing.context
    starts = cutter.starts.array(np.int64, len(cutter.names))
    arrays = contexts.array(np.int32, *shape), keeps.array(np.bool_, *shape)
    return PackedTokens(*arrays, starts, cutter.names, cutter.stride, lost)


def contexts_of_text(
    text: str, tokenizer: Any, packing: Packing
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Cut one text into contexts as a document that begins one is, the last as short as the text leaves it.

    Yields token ids [T] and which of them are rows of the SAE [T]. No EOS is put behind it, as the text may go on.
    """
    bos = bos_id(tokenizer, packing)
    head = [] if bos is None else [bos]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    stream = head + ids if packing.bos == "document" else ids
    lead = head if packing.bos == "context" else []
    stride = packing.context - len(lead)
    special = np.array([] if packing.keep_special else special_ids(tokenizer), np.int64)
    for first in range(0, len(stream), stride):
        ids_T = np.array(lead + stream[first : first + stride], np.int64)
        yield ids_T, ~np.isin(ids_T, special)


def too_short(source: TextSource, packing: Packing, split: str, rows: int, n_kept: int) -> str:
    """Say that a split has fewer rows than were asked for, and how many it has."""
    setting = "heldout_tokens" if split == HELDOUT else "tokens"
    has = f"{n_kept:,} rows in whole contexts of {packing.context} tokens" if n_kept else "no whole context"
    count = sum(1 for _ in islice(unique(source.documents()), _FEW_DOCUMENTS))
    if count < _FEW_DOCUMENTS and packing.heldout and not n_kept:
        text = "1 document" if count == 1 else f"{count} documents"
        return (
            f"{setting}={rows:,}: the text is {text}, and whole documents are held out, so that its {split} split "
            f"holds {has}: split the text into more documents, or set heldout_tokens=0 packing.heldout=0"
        )
    return (
        f"{setting}={rows:,} is more than the {source.kind} text's {split} split holds ({has}): "
        f"ask for fewer, or give more text"
    )
