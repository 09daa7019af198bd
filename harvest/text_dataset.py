"""Text from Hugging Face: a data set, downloaded or read over the network as it goes, which may pause and break off."""

from __future__ import annotations

import importlib.util
import re
import threading
import time
from collections.abc import Iterator
from itertools import islice
from types import TracebackType
from typing import Any, Literal

from data.base.config import Flag, Text
from data.base.errors import UserError
from data.base.records import Json
from harvest.chat import Keep
from harvest.text_source import Document, RowReader, TextSource, say_once, without_new

RETRY_S = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0, 60.0)  # before each try after a broken connection
SILENCE_S = 10.0  # without a row, after which the wait is reported
# Whose errors are the network's; those of the system (OSError) are so where they carry no error number.
_NETWORK = frozenset({"requests", "urllib3", "httpx", "httpcore", "aiohttp", "fsspec", "huggingface_hub", "http"})


class StreamLost(UserError):
    """A stream that broke off and did not come back."""


class DatasetText(TextSource):
    """A Hugging Face data set (extra `datasets`); its identity is its name and commit, the text is not hashed."""

    kind: Literal["dataset"] = "dataset"
    name: Text | None = None
    """On the hub, or a local folder of the data set's files."""
    config: Text | None = None
    """Which of the data set's configurations."""
    split: Text = "train"
    """Which of the data set's own splits."""
    revision: Text | None = None
    """A branch, tag or commit; null: the newest."""
    field: Text = "text"
    """The column that holds the text, the token ids or the messages."""
    chat: Keep | None = None
    """Rows are chats, rendered by the tokenizer's template: rows of `all` tokens or of the `assistant`'s words."""
    streaming: Flag = False
    """Read over the network as it goes, for a set larger than the disk."""

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
        return {**without_new(self.settings()), "revision": self.commit()}

    def commit(self) -> str:
        """Find the commit hash that `revision` stands for now; a hash asks nobody."""
        if self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self.revision
        self.check()
        from huggingface_hub import HfApi

        try:
            commit = HfApi().dataset_info(str(self.name), revision=self.revision, timeout=8).sha
        except Exception as error:  # the errors of an HTTP library that changes from version to version
            raise self._unreachable(error) from None
        assert commit is not None
        return commit

    def documents(self) -> Iterator[Document]:
        """Yield every row; a stream that breaks off is opened again, over minutes, and read on from where it was."""
        self.check()
        reader = RowReader(str(self.name), self.field, self.chat)
        number, failures = 0, 0
        try:
            while True:
                try:
                    for row in self._rows(number):
                        yield reader.document(number, row)
                        number, failures = number + 1, 0
                    return
                except Exception as error:
                    # What the first look says is the setting's fault more likely than the network's.
                    if number == 0 or not is_network_error(error):
                        raise
                    self._wait(error, number, failures)
                    failures += 1
        finally:
            reader.report()

    def _rows(self, start: int) -> Iterator[Any]:
        """Yield the rows from number `start` on; says so where none comes for a while."""
        import datasets

        try:
            rows: Any = datasets.load_dataset(
                self.name, self.config, split=self.split, revision=self.commit(), streaming=self.streaming
            )
        except (OSError, ValueError) as error:
            if isinstance(error, UserError) or (start and is_network_error(error)):
                raise
            raise self._unreachable(error) from None
        if start:
            rows = rows.skip(start) if hasattr(rows, "skip") else islice(rows, start, None)
        with _Watch(f"data set {self.name}", start) as watch:
            yield from watch.rows(iter(rows))

    def _wait(self, error: Exception, number: int, failures: int) -> None:
        """Pause before the next try; StreamLost after the last."""
        reason = _first_line(error)
        if failures >= len(RETRY_S):
            minutes = sum(RETRY_S) / 60
            raise StreamLost(
                f"data set {self.name!r} broke off at row {number:,} ({reason}) and did not come back within "
                f"{minutes:.0f} minutes: run the same command again, or set text.streaming=false to download it first"
            ) from None
        pause = RETRY_S[failures]
        say_once(
            (self.name, number, failures),
            f"data set {self.name}: connection lost at row {number:,} ({reason}); try {failures + 1} of "
            f"{len(RETRY_S)} in {pause:g} s",
        )
        time.sleep(pause)

    def _unreachable(self, error: Exception) -> UserError:
        which = f"data set {self.name!r} (config {self.config}, split {self.split}, revision {self.revision})"
        return UserError(
            f"{which} cannot be read: {_first_line(error, kind=False)}: correct the setting, or set text.revision to a "
            "downloaded commit"
        )


def is_network_error(error: BaseException) -> bool:
    """Return whether an error is of the connection, and may pass: no mistake of the user, no full disk."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno is None:
        return True
    return type(error).__module__.partition(".")[0] in _NETWORK


def _first_line(error: Exception, kind: bool = True) -> str:
    """Say an error of another library in one line, with its kind unless that is left out."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0][:300]}" if kind else lines[0].rstrip(".")


class _Watch:
    """Reports a stream that sends nothing; the time that the reader of its rows takes does not count.

    what: its name. number: of the first row.
    """

    def __init__(self, what: str, number: int) -> None:
        self.what, self.number = what, number
        self._since: float | None = None  # when the wait for the next row began
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def rows(self, rows: Iterator[Any]) -> Iterator[Any]:
        """Yield the same rows, each waited for under watch."""
        while True:
            self._since = time.monotonic()
            try:
                row = next(rows)
            except StopIteration:
                return
            finally:
                self._since = None
            yield row
            self.number += 1

    def _watch(self) -> None:
        reported = 0.0
        while not self._over.wait(SILENCE_S / 10):
            since = self._since
            waited = time.monotonic() - since if since is not None else 0.0
            if waited < SILENCE_S:
                reported = 0.0
            elif waited >= max(SILENCE_S, 2 * reported):  # then after twice as long, and so on
                reported = waited
                say_once(
                    (self.what, self.number, round(waited)),
                    f"{self.what}: no row for {waited:.0f} s (waiting for row {self.number:,})",
                )
