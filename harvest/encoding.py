"""A document's text -> its token ids, and the table of a range of documents that is stored with them.

What packing puts around documents and contexts (BOS, EOS) is not here: the ids are those of the text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from data.store.token_store import DocumentTable, TokenRange
from harvest.chat import Chat, rendered
from harvest.text_source import token_ids

ENCODE_AT_ONCE = 64  # documents handed to the tokenizer together


@dataclass(frozen=True)
class EncodedDocument:
    """A document's ids [n], and which of their rows may be harvested [n]: of a chat not all, of a text all.

    own: it came as token ids or as a chat, whose ids may begin with a BOS already.
    """

    name: str
    ids: NDArray[np.int32]
    wanted: NDArray[np.bool_]
    own: bool


def encoded(documents: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[EncodedDocument]:
    """Yield the ids of each (name, text), by `ENCODE_AT_ONCE` documents."""
    documents = iter(documents)
    while batch := list(islice(documents, ENCODE_AT_ONCE)):
        yield from _by_tokenizer(batch, tokenizer)


def _by_tokenizer(batch: list[tuple[str, str]], tokenizer: Any) -> Iterator[EncodedDocument]:
    texts = [text for _, text in batch if token_ids(text) is None and Chat.from_text(text) is None]
    of_texts: Iterator[list[int]] = iter(())
    if texts:
        # verbose=False: a document longer than the model's context is no mistake here, it is cut.
        said = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        of_texts = iter(said["input_ids"])
    for name, text in batch:
        given, chat = token_ids(text), Chat.from_text(text)
        if chat is not None:
            ids, wanted = rendered(chat, tokenizer, name)
        else:
            ids = next(of_texts) if given is None else given
            wanted = np.ones(len(ids), np.bool_)
        yield EncodedDocument(name, np.array(ids, np.int32), wanted, given is not None or chat is not None)


def token_range(
    documents: Iterable[tuple[str, str]],
    tokenizer: Any,
    special: Sequence[int],
    *,
    characters: int,
    last: bool,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> TokenRange:
    """Tokenise the documents of a range.

    special: the ids that stand for no text. characters, last: as `TokenRange` has them. on_tokens: is given the number
    of tokens of each document. A document that cannot be tokenised (UserError) ends the range, which then says why: it
    is refused where it is packed, and not before.
    """
    done: list[EncodedDocument] = []
    refused = ""
    try:
        for doc in encoded(documents, tokenizer):
            done.append(doc)
            on_tokens(len(doc.ids))
    except UserError as error:
        refused = str(error)
    tokens = np.concatenate([np.zeros(0, np.int32), *(doc.ids for doc in done)])
    table = DocumentTable(
        lengths=np.array([len(doc.ids) for doc in done], np.int64),
        own=np.array([doc.own for doc in done], np.bool_),
        firsts=np.array([doc.ids[0] if len(doc.ids) else -1 for doc in done], np.int32),
        largest=np.array([doc.ids.max(initial=-1) for doc in done], np.int32),
        wanted=np.concatenate([np.zeros(0, np.bool_), *(doc.wanted for doc in done)]),
        special=np.isin(tokens, np.array(special, np.int32)),
        names=[doc.name for doc in done],
    )
    return TokenRange(table, tokens, characters, last or bool(refused), refused)
