"""Documents: where text comes from, and which split each document belongs to.

A source is a frozen dataclass that yields `Document`s in a fixed order. Its `settings()` are the question as the user
asked it; its `identity()` is what the store's fingerprint records: the same with a hash of the text, or a data set's
commit.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import importlib.util
import json
import re
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.base.errors import UserError
from data.base.records import Json
from data.store.manifest import HELDOUT, TRAIN

__all__ = [
    "HELDOUT",
    "TRAIN",
    "DatasetText",
    "Document",
    "FilesText",
    "StdlibText",
    "TextSource",
    "source_from",
    "split_of",
    "unique",
]

# Not prose anyone wrote, or not on every machine: test packages, generated tables, installed packages, build settings.
STDLIB_SKIP = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"})

PARQUET_ROWS = 256  # documents in memory at once


@dataclass(frozen=True)
class Document:
    """One text. `key` decides its split: the module path for the standard library, the text itself elsewhere."""

    name: str
    text: str
    key: str


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def split_of(key: str, heldout: float) -> str:
    """The split of a document: `heldout` for that fraction of all keys, by the first 64 bits of the key's sha256."""
    return HELDOUT if int.from_bytes(digest(key)[:8], "big") < heldout * 2**64 else TRAIN


def unique(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop blank documents and those whose exact text came before, so that no text can stand in both splits."""
    seen: set[bytes] = set()
    for doc in documents:
        found = digest(doc.text)
        if doc.text.strip() and found not in seen:
            seen.add(found)
            yield doc


@dataclass(frozen=True)
class TextSource(ABC):
    """Where documents come from; the fields are the settings under `text` in the configuration."""

    kind: ClassVar[str]

    @abstractmethod
    def check(self) -> None:
        """Refuse, in a moment and without reading the text, what cannot work (UserError)."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, in an order that is the same each time."""

    def settings(self) -> Json:
        """The plain values `source_from` rebuilds this source from."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def identity(self) -> Json:
        """The settings with the number of documents and a hash over all of them, in order; UserError for empty text."""
        whole, count = hashlib.sha256(), 0
        for doc in unique(self.documents()):
            whole.update(digest(doc.key) + digest(doc.text))
            count += 1
        if not count:
            raise UserError(f"the text {self.settings()} holds no document that is not blank: choose another text")
        return {**self.settings(), "documents": count, "sha256": whole.hexdigest()}


def stdlib_files(root: Path) -> list[Path]:
    """The Python sources under `root` that count as the standard library's text, in order of their module path."""
    files = [
        p
        for p in root.rglob("*.py")
        if not STDLIB_SKIP.intersection(p.relative_to(root).parts) and not p.name.startswith("_sysconfigdata")
    ]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


@dataclass(frozen=True)
class StdlibText(TextSource):
    """The standard library of the running Python, one document a module; split by module path on every version."""

    kind: ClassVar[str] = "stdlib"
    root: str | None = None

    def check(self) -> None:
        if self.root is not None and not Path(self.root).is_dir():
            raise UserError(f"text.root={self.root} is not a folder: leave it null for the running Python's library")

    def documents(self) -> Iterator[Document]:
        root = Path(self.root or sysconfig.get_path("stdlib"))
        for path in stdlib_files(root):
            name = path.relative_to(root).as_posix()
            yield Document(name, path.read_text(encoding="utf-8", errors="replace"), name)


@dataclass(frozen=True)
class FilesText(TextSource):
    """Local files or globs: `.txt` is one document, `.jsonl` and `.parquet` have one a row, in the column `field`."""

    kind: ClassVar[str] = "files"
    paths: Sequence[str] = ()
    field: str = "text"

    def __post_init__(self) -> None:
        paths = [self.paths] if isinstance(self.paths, str) else list(self.paths or ())
        object.__setattr__(self, "paths", paths)

    def files(self) -> list[Path]:
        """The files matched, in the order of `paths` and by name within a glob, each once."""
        if not self.paths:
            raise UserError("text.paths names no file: give one, as in 'text=files text.paths=[books/*.txt]'")
        found: dict[Path, None] = {}
        for pattern in self.paths:
            # A file's own name may hold brackets, so a name that exists is never read as a pattern.
            names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
            files = [Path(name) for name in names if Path(name).is_file()]
            if not files:
                raise UserError(f"text.paths: no file matches {pattern!r} (seen from {Path.cwd()}): mend the path")
            found.update(dict.fromkeys(files))
        return list(found)

    def check(self) -> None:
        for path in self.files():
            if path.suffix not in (".txt", ".jsonl", ".parquet"):
                raise UserError(f"{path} is neither .txt, .jsonl nor .parquet: convert it, or narrow text.paths")
            if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
                raise UserError(
                    f"{path} needs the extra `parquet`, which is not installed: run `.venv/bin/pip install pyarrow`"
                )

    def documents(self) -> Iterator[Document]:
        self.check()
        for path in self.files():
            try:
                yield from {".txt": self._whole, ".jsonl": self._lines, ".parquet": self._rows}[path.suffix](path)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None

    def _whole(self, path: Path) -> Iterator[Document]:
        text = path.read_text(encoding="utf-8")
        yield Document(str(path), text, text)

    def _lines(self, path: Path) -> Iterator[Document]:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(f"{path}:{number}", _parsed(f"{path}:{number}", line), self.field)

    def _rows(self, path: Path) -> Iterator[Document]:
        """A batch of rows at a time, so that not even a row group has to fit in memory."""
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                if self.field not in file.schema_arrow.names:
                    raise UserError(f"{path} has no column {self.field!r} ({file.schema_arrow.names}): set text.field")
                batches = file.iter_batches(PARQUET_ROWS, columns=[self.field], use_threads=False)
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows, 1):
                    yield _document(f"{path}:{number}", row, self.field)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the system's, not pyarrow's
                raise
            told = str(error).strip().splitlines()[0].rstrip(".")
            raise UserError(f"{path} is damaged or no parquet file ({told}): download or convert it again") from None


def _parsed(name: str, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON ({error.msg}): mend the line or remove it") from None


def _document(name: str, row: object, field: str) -> Document:
    if not isinstance(row, Mapping) or not isinstance(row.get(field), str):
        has = f"it has {sorted(map(str, row))}" if isinstance(row, Mapping) else "it is no object"
        raise UserError(f"{name} has no text under {field!r} ({has}): set text.field")
    return Document(name, row[field], row[field])


@dataclass(frozen=True)
class DatasetText(TextSource):
    """A Hugging Face data set (extra `datasets`); its identity is its name and commit, the text is not hashed."""

    kind: ClassVar[str] = "dataset"
    name: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    field: str = "text"
    streaming: bool = False

    def check(self) -> None:
        if not self.name:
            raise UserError(
                "text.name names no data set: give one, as in 'text=dataset text.name=roneneldan/TinyStories'"
            )
        if importlib.util.find_spec("datasets") is None:
            raise UserError(
                "text=dataset needs the extra `datasets`, which is not installed: run `.venv/bin/pip install datasets`"
            )

    def identity(self) -> Json:
        return {**self.settings(), "revision": self.commit()}

    def commit(self) -> str:
        """The commit hash that `revision` stands for now; a hash asks nobody."""
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self.revision
        self.check()
        from huggingface_hub import HfApi

        try:
            found = HfApi().dataset_info(str(self.name), revision=self.revision, timeout=8).sha
        except Exception as error:  # the errors of an HTTP library that changes from version to version
            raise self._unreachable(error) from None
        assert found is not None
        return found

    def documents(self) -> Iterator[Document]:
        self.check()
        import datasets

        try:
            rows: Any = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.commit(), streaming=self.streaming
            )
        except (OSError, ValueError) as error:
            raise error if isinstance(error, UserError) else self._unreachable(error) from None
        for number, row in enumerate(rows):
            yield _document(f"{self.name}:{number}", row, self.field)

    def _unreachable(self, error: Exception) -> UserError:
        told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        asked = f"data set {self.name!r} (config {self.config}, split {self.split}, revision {self.revision})"
        return UserError(
            f"{asked} cannot be read: {told}: mend the setting, or set text.revision to a downloaded commit"
        )


SOURCES: dict[str, type[TextSource]] = {source.kind: source for source in (StdlibText, FilesText, DatasetText)}


def source_from(settings: Mapping[str, Any]) -> TextSource:
    """The source that `settings` (the configuration's group `text`, or a manifest's) describe, or a UserError."""
    given = dict(settings)
    kind = given.pop("kind", None)
    if kind not in SOURCES:
        raise UserError(f"text.kind={kind} is unknown: choose one of {', '.join(SOURCES)}")
    known = {field.name for field in dataclasses.fields(SOURCES[kind])}
    if unknown := sorted(set(given) - known):
        raise UserError(f"text.{unknown[0]} means nothing for text of kind {kind}: it takes {', '.join(sorted(known))}")
    return SOURCES[kind](**given)
