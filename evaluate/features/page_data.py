"""The data of feature pages, read back from their folder (evaluate/features/pages.py writes them).

No torch here: labels are made where no language model runs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.base.errors import UserError
from data.base.files import write_atomic
from data.base.records import Json
from evaluate.report.render import safe_json

LABELS_JS = "labels.js"


def data_name(kind: str, number: int) -> str:
    """Return the name of a numbered data file: `part-007.js` of the latents, `text-007.js` of the contexts."""
    return f"{kind}-{number:03d}.js"


@dataclass(frozen=True)
class Context:
    """One example of a latent: its tokens, the activation on each (0 where it does not fire), and where it stands.

    peak: which of the tokens the example was chosen for.
    """

    tokens: list[str]
    values: list[float]
    place: tuple[int, int]
    peak: int

    @property
    def text(self) -> str:
        """Return the text without marks."""
        return "".join(self.tokens)

    @property
    def marked(self) -> str:
        """Return the text with each run of tokens on which the latent fires between << and >>."""
        shown = "".join(f"<<{t}>>" if value else t for t, value in zip(self.tokens, self.values, strict=True))
        return shown.replace(">><<", "")


class PageData:
    """The pages in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[int, Json] = {}
        try:
            html = (folder / "index.html").read_text(encoding="utf-8")
        except OSError:
            raise UserError(
                f"pages={folder} holds no feature pages: make them with python -m evaluate.features"
            ) from None
        found = re.search(r'<script type="application/json" id="page">(.*?)</script>', html)
        if found is None:
            raise UserError(f"{folder / 'index.html'} is no feature page: make the pages again")
        self.page: Json = json.loads(found[1])

    @property
    def width(self) -> int:
        """Return the number of latents."""
        return int(self.page["width"])

    @cached_property
    def index(self) -> Json:
        """Return what lists and search know of every latent."""
        return dict(self._call("index.js")[0])

    @property
    def labels(self) -> dict[str, Json]:
        """Return the labels given so far, by the latent's number as text."""
        return dict(self._call(LABELS_JS)[0])

    def write_labels(self, labels: dict[str, Json]) -> None:
        """Put labels in the place of those there."""
        write_atomic(self.folder / LABELS_JS, f"thresher.labels({safe_json(labels)});\n")

    def record(self, latent: int) -> tuple[Json, list[str]]:
        """Return what the pages hold of one latent, as pages.py wrote it, and the strings its tokens are numbers of."""
        number, place = divmod(latent, self.page["a_piece"])
        if number not in self._pieces:
            self._pieces[number] = self._call(data_name("part", number))[1]
        piece = self._pieces[number]
        return piece["latents"][place], piece["tokens"]

    def examples(self, latent: int) -> tuple[list[Context], list[Context]]:
        """Return the contexts with a latent's largest activations, and others drawn at random, none of them twice."""
        record, tokens = self.record(latent)
        groups = [[_context(example, tokens) for example in group["c"]] for group in record["g"]]
        return (groups[0], [one for group in groups[1:] for one in group]) if groups else ([], [])

    @cached_property
    def context_length(self) -> int:
        """Return how many tokens a context has."""
        return len(self._call(data_name("text", 0))[1]["contexts"][0])

    def _call(self, name: str) -> list[Any]:
        """Read the values that a data script calls its function with."""
        try:
            text = (self.folder / name).read_text(encoding="utf-8")
            found: list[Any] = json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")
        except (OSError, ValueError):
            raise UserError(f"{self.folder / name} cannot be read: make the pages again") from None
        return found


def _context(example: Json, tokens: list[str]) -> Context:
    values = [0.0] * len(example["t"])
    for at, value in zip(example["a"][::2], example["a"][1::2], strict=True):
        values[at] = value
    sequence, position = example["s"]
    return Context([tokens[t] for t in example["t"]], values, (sequence, position), example["p"])
