"""Texts, tokenizers and token stores small enough to be tokenised in each test; run as a module, a slow worker."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from data.store.manifest import TRAIN
from data.store.token_store import RangeSizes, TokenStore
from harvest.documents import Document, TextSource
from harvest.packing import Packing
from harvest.stored_text import StoredText
from harvest.text_dataset import StreamLost
from harvest.tokenise import Tokeniser
from tests.helpers.corpus import story, tokenizer

STORIES = [story(n) for n in range(60)]
SMALL = RangeSizes(first=200, most=600, documents=9)


class Texts(TextSource):
    """Documents given in the test; `ends` with an error of the network where it is set."""

    kind: str = "files"
    texts: list[str] = Field(default_factory=list)
    ends: bool = False

    def check(self) -> None: ...

    def documents(self) -> Iterator[Document]:
        for number, text in enumerate(self.texts):
            yield Document(f"doc {number}", text, text)
        if self.ends:
            raise StreamLost("the stream broke off")


def plain(context: int, **more: Any) -> Packing:
    return Packing.of({"context": context, "bos": "document", "shuffle": None, "heldout": 0.0, **more})


class Counting:
    """The tests' tokenizer, which counts the documents it is given and ends as it is told to."""

    def __init__(self, on_document: Callable[[int], None] = lambda count: None) -> None:
        self._real, self._on_document = tokenizer(), on_document
        self.documents = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.documents += len(texts)
        self._on_document(self.documents)
        return self._real(texts, **options)


def store_in(folder: Path, sizes: RangeSizes = SMALL) -> TokenStore:
    return TokenStore.create_or_open(folder, {"text": "ours"}, {}, sizes)


def tokenised(
    folder: Path, source: TextSource, packing: Packing, rows: int, *, split: str = TRAIN, **more: Any
) -> StoredText:
    """The contexts of a split out of the token store in a folder."""
    words = more.pop("tokenizer", None) or tokenizer()
    return Tokeniser(store_in(folder), source, words, packing, quiet=True).text(split, rows, **more)


KILLED_TEXT, KILLED_PACKING, KILLED_ROWS = Texts(texts=STORIES), plain(8, shuffle=0), 3300

if __name__ == "__main__":
    slow = Counting(lambda count: time.sleep(0.05))
    tokenised(Path(sys.argv[1]), KILLED_TEXT, KILLED_PACKING, KILLED_ROWS, tokenizer=slow)
