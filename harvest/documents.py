"""The kinds of text there are, by name: the one table a setting chooses from, which calls nothing else.

To add a kind: a subclass of `TextSource` with its settings as documented fields, a line here, a file in conf/text, and
a case in tests/harvest/test_documents.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.base.errors import UserError
from data.store.manifest import HELDOUT, TRAIN
from harvest.text_dataset import DatasetText
from harvest.text_files import FilesText, StdlibText
from harvest.text_source import Document, TextSource, split_of, unique

__all__ = [
    "HELDOUT",
    "SOURCES",
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

SOURCES: dict[str, type[TextSource]] = {"stdlib": StdlibText, "files": FilesText, "dataset": DatasetText}


def source_from(settings: Mapping[str, Any] | TextSource) -> TextSource:
    """Make the source that `settings` (the configuration's group `text`,
    or a manifest's) describe, or a UserError."""
    if isinstance(settings, TextSource):
        return settings
    if not isinstance(settings, Mapping):
        raise UserError(f"text={settings} is no group of settings: choose text=stdlib, text=files or text=dataset")
    kind = settings.get("kind")
    source = SOURCES.get(kind) if isinstance(kind, str) else None
    if source is None:
        raise UserError(f"text.kind={kind} is unknown: choose one of {', '.join(SOURCES)}")
    return source.of(settings, "text")
