"""Text in files: the standard library of the running Python, and files of text, JSON lines or parquet."""

from __future__ import annotations

import glob
import gzip
import importlib.util
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

from pydantic import BeforeValidator, Field

from data.base.config import Text
from data.base.errors import UserError
from harvest.chat import Keep
from harvest.text_source import Document, RowReader, TextSource, readable, say_once

# Not prose anyone wrote, or not on every machine: test packages, generated tables, installed packages, build settings.
STDLIB_SKIP = frozenset({"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"})

TEXT_SUFFIXES = (".txt",)
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSED = (".gz", ".zst")
PARQUET_ROWS = 256  # documents in memory at once


def stdlib_files(root: Path) -> list[Path]:
    """Find the Python sources under `root` that count as the standard library's text,
    in order of their module path."""
    files = [
        p
        for p in root.rglob("*.py")
        if not STDLIB_SKIP.intersection(p.relative_to(root).parts) and not p.name.startswith("_sysconfigdata")
    ]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


class StdlibText(TextSource):
    """The standard library of the running Python, one document a module; split by module path on every version."""

    kind: Literal["stdlib"] = "stdlib"
    root: Text | None = None
    """Another folder of Python sources; null: the running Python's library."""

    def check(self) -> None:
        if self.root is not None and not Path(self.root).is_dir():
            raise UserError(f"text.root={self.root} is not a folder: leave it null for the running Python's library")

    def documents(self) -> Iterator[Document]:
        root = Path(self.root or sysconfig.get_path("stdlib"))
        for path in stdlib_files(root):
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(name, readable(text, name, str(root)), name)


def _as_list(value: Any) -> Any:
    """Return one path as a list of one, none as an empty list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


class FilesText(TextSource):
    """Local files, folders or globs, in the order of `paths`.

    `.txt` is one document; `.jsonl`, `.ndjson` and `.json` have one a line (or are one list), `.parquet` one a row, in
    the column `field`: a text, or a list of token ids. All but parquet may be compressed (`.gz`, `.zst`).
    """

    kind: Literal["files"] = "files"
    paths: Annotated[list[Text], BeforeValidator(_as_list)] = Field(default_factory=list)
    """Files, globs, or folders, of which every text below is taken."""
    field: Text = "text"
    """The key of a line, or the column of a row, that holds the text, the token ids or the messages."""
    chat: Keep | None = None
    """Rows are chats, rendered by the tokenizer's template: rows of `all` tokens or of the `assistant`'s words."""

    def files(self) -> list[Path]:
        """Find the files matched, in the order of `paths` and by name within a glob or folder, each once."""
        if not self.paths:
            raise UserError("text.paths names no file: give one, as in 'text=files text.paths=[books/*.txt]'")
        files: dict[Path, None] = {}
        for pattern in self.paths:
            files.update(dict.fromkeys(_matches(pattern)))
        return list(files)

    def check(self) -> None:
        for path in self.files():
            kind, compression = _format(path)
            if kind is None:
                raise UserError(
                    f"{path} is no text that can be read (.txt, .jsonl, .json, .parquet, and all but parquet also as "
                    ".gz or .zst): convert it, or narrow text.paths"
                )
            if self.chat is not None and kind in TEXT_SUFFIXES:
                raise UserError(f"{path} is a text, no chats as text.chat={self.chat} needs: give .jsonl or .parquet")
            needs_pyarrow = kind == ".parquet" or compression == ".zst"
            if needs_pyarrow and importlib.util.find_spec("pyarrow") is None:
                raise UserError(
                    f"{path} needs the extra `parquet`, which is not installed: run `.venv/bin/pip install pyarrow`"
                )

    def documents(self) -> Iterator[Document]:
        self.check()
        for path in self.files():
            kind, _ = _format(path)
            rows = RowReader(str(path), self.field, self.chat)
            try:
                if kind in TEXT_SUFFIXES and self.chat is not None:
                    raise UserError(
                        f"{path} holds no messages, as text.chat={self.chat} needs: give .jsonl or .parquet"
                    )
                if kind in TEXT_SUFFIXES:
                    yield _whole_text(path)
                elif kind in LINE_SUFFIXES:
                    yield from _json_rows(path, rows)
                else:
                    yield from _parquet_rows(path, rows)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
            except (EOFError, zlib.error, OSError) as error:
                if isinstance(error, OSError) and error.errno:  # the system's, not that of gzip or pyarrow
                    raise
                raise UserError(f"{path} is damaged or not compressed ({error}): download it again") from None
            finally:
                rows.report()


def _matches(pattern: str) -> list[Path]:
    """Find the files that one entry of `paths` stands for; UserError where there are none."""
    if not pattern.strip():
        raise UserError("text.paths has an empty entry: name a file, a folder or a glob")
    try:
        # A file's own name may hold brackets, so a name that exists is never read as a pattern.
        if Path(pattern).is_dir():
            return _files_below(Path(pattern))
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"text.paths: {pattern[:80]!r} is no path ({reason}): correct it") from None
    if not files:
        raise UserError(f"text.paths: no file matches {pattern!r} (seen from {Path.cwd()}): correct the path")
    return files


def _files_below(folder: Path) -> list[Path]:
    """Find every text below a folder, by path; says how many other files are left out."""
    visible = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    texts = [path for path in visible if _format(path)[0] is not None]
    if not texts:
        raise UserError(f"text.paths: the folder {folder} holds no .txt, .jsonl or .parquet: name one that does")
    others = [path for path in visible if _format(path)[0] is None]
    if others:
        say_once((str(folder), "others"), f"{folder}: {others[0].name} and other files that are no text are left out")
    return texts


def _format(path: Path) -> tuple[str | None, str | None]:
    """Return (suffix that says how to read it, that of its compression), both in small letters,
    None where it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else None
    kind = suffixes[-1] if suffixes else None
    known = (*TEXT_SUFFIXES, *LINE_SUFFIXES) if compression else (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")
    return (kind if kind in known else None), compression


def _open(path: Path) -> TextIO:
    """Open a file as text, unpacked as its suffix says; a byte order mark is no text."""
    compression = _format(path)[1]
    if compression == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig")
    if compression == ".zst":
        import pyarrow

        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _whole_text(path: Path) -> Document:
    with _open(path) as file:
        text = readable(file.read(), str(path), str(path))
    return Document(str(path), text, text)


def _json_rows(path: Path, rows: RowReader) -> Iterator[Document]:
    """Yield one document a line; a file that begins with `[` is one list of them."""
    with _open(path) as file:
        first = next((line for line in file if line.strip()), "")
        if first.lstrip().startswith("[") and ".json" in (suffix.lower() for suffix in path.suffixes):
            whole = _parsed(str(path), first + file.read())
            assert isinstance(whole, list)
            for number, row in enumerate(whole, 1):
                yield rows.document(number, row)
            return
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield rows.document(number, _parsed(f"{path}:{number}", line))


def _parsed(name: str, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{name} is not JSON ({error.msg}): correct the line or remove it") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, brackets in thousands
        raise UserError(f"{name} is not JSON that can be read: correct the line or remove it") from None


def _parquet_rows(path: Path, rows: RowReader) -> Iterator[Document]:
    """Yield a batch of rows at a time, so that not even a row group has to fit in memory."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if rows.field not in names:
                raise UserError(f"{path} has no column {rows.field!r} ({names}): set text.field")
            batches = file.iter_batches(PARQUET_ROWS, columns=[rows.field], use_threads=False)
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield rows.document(number, row)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, not pyarrow's
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{path} is damaged or no parquet file ({reason}): download or convert it again") from None
