"""The pages of one SAE: `index.html`, a summary of all latents in `index.js`, the latents themselves in pieces.

A page opened from disk may not fetch, so the data are scripts that call `thresher.index` and `thresher.piece`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.files import write_atomic
from data.base.records import Json
from evaluate.features.collect import Collector, Shelf
from evaluate.report.render import asset, render, safe_json, script_hash
from harvest.packing import PackedTokens

LATENTS_A_PIECE = 128
LABELS = 4  # tokens that name a latent in lists, of those it fires on and of those it raises
PAGES_FORMAT = 1


class Strings:
    """Strings by number, each stored once."""

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self._text_of, self._numbers = text_of, dict[int, int]()
        self.texts: list[str] = []

    def number(self, key: int) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.texts)
            self.texts.append(self._text_of(key))
        return self._numbers[key]

    def numbers(self, keys: Sequence[int]) -> list[int]:
        return [self.number(int(key)) for key in keys]


@dataclass(frozen=True)
class Words:
    """The text of tokens, one by one."""

    tokenizer: Any

    def text(self, token: int) -> str:
        """Decode the token alone as the tokenizer does, with the space that a piece of SentencePiece begins with."""
        text = str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        raw = self.tokenizer.convert_ids_to_tokens(token)
        return f" {text}" if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" ") else text


@dataclass(frozen=True)
class Latents:
    """All that the pages tell of F latents; ends are (ids [F, K], values [F, K]), None where there are none."""

    collector: Collector
    packed: PackedTokens
    words: Words
    near: tuple[NDArray[np.int64], NDArray[np.float32]]
    raised: tuple[NDArray[np.int64], NDArray[np.float32]] | None
    lowered: tuple[NDArray[np.int64], NDArray[np.float32]] | None
    quantiles: tuple[float, ...]
    at_a_quantile: int  # examples


def short(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.3g}")


def nearest(values_k: NDArray[np.float32], targets: Sequence[float], count: int) -> list[list[int]]:
    """Find for each target the places of up to `count` values nearest to it;
    what one target takes, later ones lack."""
    free, taken = list(range(len(values_k))), []
    for target in targets:
        free.sort(key=lambda place: (abs(float(values_k[place]) - target), place))
        taken.append(free[:count])
        free = free[count:]
    return taken


class Pieces:
    """Turns latents into plain JSON."""

    def __init__(self, latents: Latents) -> None:
        self.latents = latents
        self.interest_F = latents.collector.interest_F()

    def context(self, shelf: Shelf, latent: int, place: int, tokens: Strings, documents: dict[str, int]) -> Json:
        """Return one example: token numbers, the place of its token among them, and (place,
        activation) where it fires."""
        packed, offsets = self.latents.packed, self.latents.collector.offsets_W
        sequence, position = int(shelf.sequence_FK[latent, place]), int(shelf.position_FK[latent, place])
        inside = (position + offsets >= 0) & (position + offsets < packed.contexts.shape[1])
        window = shelf.window_FKW[latent, place][inside]
        ids = packed.contexts[sequence, position + offsets[inside]]
        active = np.flatnonzero(window)
        name = packed.document(sequence, position)
        return {
            "t": tokens.numbers(ids.tolist()),
            "p": int(np.flatnonzero(offsets[inside] == 0)[0]),
            "a": [pair for at in active.tolist() for pair in (at, short(float(window[at])))],
            "d": documents.setdefault(name, len(documents)),
            "s": [sequence, position],
        }

    def groups(self, latent: int, tokens: Strings, documents: dict[str, int]) -> list[Json]:
        """Return the top contexts, then examples around each quantile of the sample that are not among the top ones."""
        top, sample = self.latents.collector.top, self.latents.collector.sample
        shown = [place for place in range(top.places) if top.sequence_FK[latent, place] >= 0]
        groups: list[Json] = [{"c": [self.context(top, latent, place, tokens, documents) for place in shown]}]
        seen = {(top.sequence_FK[latent, place], top.position_FK[latent, place]) for place in shown}
        drawn = np.flatnonzero(sample.sequence_FK[latent] >= 0).tolist()
        at = list(zip(sample.sequence_FK[latent], sample.position_FK[latent], strict=True))
        fresh = [place for place in drawn if at[place] not in seen]
        values = np.quantile(sample.value_FK[latent, drawn], self.latents.quantiles).tolist()
        chosen = nearest(sample.value_FK[latent, fresh], values, self.latents.at_a_quantile)
        for quantile, value, places in zip(self.latents.quantiles, values, chosen, strict=True):
            if places:
                contexts = [self.context(sample, latent, fresh[place], tokens, documents) for place in places]
                groups.append({"q": quantile, "v": short(value), "c": contexts})
        return groups

    def latent(self, latent: int, tokens: Strings, documents: dict[str, int]) -> Json:
        """Return all of one latent but what the summary has."""
        counts, bin_width = self.latents.collector.histogram(latent)
        ids, cosines = self.latents.near
        piece: Json = {
            "h": counts,
            "w": bin_width,
            "n": [[int(i), round(float(c), 3)] for i, c in zip(ids[latent], cosines[latent], strict=True)],
            "g": self.groups(latent, tokens, documents) if self.latents.collector.fired_F[latent] else [],
        }
        for name, ends in (("r", self.latents.raised), ("l", self.latents.lowered)):
            if ends is not None:
                pairs = zip(ends[0][latent], ends[1][latent], strict=True)
                piece[name] = [[tokens.number(int(token)), short(float(value))] for token, value in pairs]
        return piece

    def piece(self, first: int) -> Json:
        """Return the latents from `first` on, with the strings they need."""
        tokens, documents = Strings(self.latents.words.text), dict[str, int]()
        every = range(first, min(first + LATENTS_A_PIECE, self.latents.collector.width))
        latents = [self.latent(latent, tokens, documents) for latent in every]
        return {"latents": latents, "tokens": tokens.texts, "documents": list(documents)}

    def peak_tokens(self, latent: int) -> list[int]:
        """Return the tokens at the peaks of the top contexts, the most frequent first."""
        top, contexts = self.latents.collector.top, self.latents.packed.contexts
        places = [place for place in range(top.places) if top.sequence_FK[latent, place] >= 0]
        at = (top.sequence_FK[latent, places], top.position_FK[latent, places])
        return [token for token, _ in Counter(contexts[at].tolist()).most_common(LABELS)]

    def summary(self) -> Json:
        """Return what lists, search and sort need of every latent."""
        collector, tokens = self.latents.collector, Strings(self.latents.words.text)
        raised = self.latents.raised
        every = range(collector.width)
        return {
            "fired": collector.fired_F.tolist(),
            "contexts": collector.contexts_F.tolist(),
            "mean": [short(v) for v in collector.total_F / np.maximum(collector.fired_F, 1)],
            "max": [short(float(v)) for v in collector.largest_F],
            "interest": [short(float(v)) for v in self.interest_F],
            "peaks": [tokens.numbers(self.peak_tokens(latent)) for latent in every],
            "raised": None if raised is None else [tokens.numbers(raised[0][i, :LABELS].tolist()) for i in every],
            "tokens": tokens.texts,
        }


def write_pages(latents: Latents, about: Json, out: Path, bar: Callable[[int], Any]) -> Path:
    """Write the pages into `out`, `index.html` last; its path. `about` stands at the top.

    `bar` is called with how many latents were written.
    """
    out.mkdir(parents=True, exist_ok=True)
    pieces = Pieces(latents)
    width = latents.collector.width
    for number, first in enumerate(range(0, width, LATENTS_A_PIECE)):
        piece = pieces.piece(first)
        write_atomic(out / piece_name(number), f"thresher.piece({number},{safe_json(piece)});\n")
        bar(len(piece["latents"]))
    write_atomic(out / "index.js", f"thresher.index({safe_json(pieces.summary())});\n")
    for stale in _beyond(out, -(-width // LATENTS_A_PIECE)):
        stale.unlink()
    page = {"about": about, "width": width, "tokens": latents.collector.tokens, "a_piece": LATENTS_A_PIECE}
    script = asset("features.js")
    html = render(
        "features.html", page=page, about=about, style=asset("base.css") + asset("features.css"), script=script,
        script_digest=script_hash(script),
    )  # fmt: skip
    write_atomic(out / "index.html", html)
    return out / "index.html"


def piece_name(number: int) -> str:
    return f"part-{number:03d}.js"


def _beyond(out: Path, count: int) -> Iterator[Path]:
    """Find pieces of an SAE with more latents that had its pages here before."""
    for path in out.glob("part-*.js"):
        if path.stem.removeprefix("part-").isdigit() and int(path.stem.removeprefix("part-")) >= count:
            yield path
