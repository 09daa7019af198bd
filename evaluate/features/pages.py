"""The pages of one SAE: `index.html`, a summary of all latents in `index.js`, the latents themselves in pieces
(`part-*.js`), the contexts they were read from (`text-*.js`), and the labels that someone gave them (`labels.js`).

A page opened from disk may not fetch, so the data are scripts that call `thresher.index`, `thresher.piece` and so on.
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
from evaluate.features.page_data import LABELS_JS, data_name
from evaluate.report.render import asset, render, safe_json, script_hash
from harvest.packing import PackedTokens

LATENTS_A_PIECE = 128
TOKENS_A_TEXT = 1 << 14  # of whole contexts in one file
TOKEN_FIGURES = 6  # tokens that a latent's statistics name
LABELS = 4  # tokens that name a latent in lists, of those it fires on and of those it raises


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
class OtherSAE:
    """The SAE that the pages compare with, whose own pages are in the folder `path` below these.

    near: for each latent the ids [F, K] and cosines [F, K] of the nearest decoder rows of the other SAE. peaks: the
    tokens that each of the other's latents fires on most.
    """

    name: str
    path: str
    near: tuple[NDArray[np.int64], NDArray[np.float32]]
    peaks: list[list[int]]


TokenEnds = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class Latents:
    """All that the pages tell of F latents; ends are (ids [F, K], values [F, K]), None where there are none.

    together: for each latent those that fire on its tokens, with the share. other: the SAE compared with. reads: of a
    transcoder the tokens whose embeddings raise and lower it most.
    """

    collector: Collector
    packed: PackedTokens
    words: Words
    near: TokenEnds
    raised: TokenEnds | None
    lowered: TokenEnds | None
    quantiles: tuple[float, ...]
    at_a_quantile: int  # examples
    together: list[list[tuple[int, float]]]
    other: OtherSAE | None = None
    reads: tuple[TokenEnds, TokenEnds] | None = None


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
        """Return one example: the numbers of its tokens `t`, the place `p` of its own token among them, the places and
        activations `a` where the latent fires among them, and `o`, positions and activations elsewhere in the context.
        """
        packed, offsets = self.latents.packed, self.latents.collector.offsets_W
        sequence, position = int(shelf.sequence_FK[latent, place]), int(shelf.position_FK[latent, place])
        inside = (position + offsets >= 0) & (position + offsets < packed.contexts.shape[1])
        window = shelf.window_FKW[latent, place][inside]
        ids = packed.contexts[sequence, position + offsets[inside]]
        active = np.flatnonzero(window)
        positions, values = shelf.whole_FK[latent, place]
        shown = range(max(0, position + int(offsets[0])), position + int(offsets[-1]) + 1)
        elsewhere = [
            number
            for at, value in zip(positions.tolist(), values.tolist(), strict=True)
            if at not in shown
            for number in (at, short(value))
        ]
        name = packed.document(sequence, position)
        return {
            "t": tokens.numbers(ids.tolist()),
            "p": int(np.flatnonzero(offsets[inside] == 0)[0]),
            "a": [pair for at in active.tolist() for pair in (at, short(float(window[at])))],
            "o": elsewhere,
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

    def token_figures(self, latent: int, tokens: Strings) -> list[list[float]]:
        """Return the tokens that the latent fires on most: number, share of the drawn firings, mean activation."""
        sample = self.latents.collector.sample
        drawn = np.flatnonzero(sample.sequence_FK[latent] >= 0)
        ids = self.latents.packed.contexts[sample.sequence_FK[latent, drawn], sample.position_FK[latent, drawn]]
        values = sample.value_FK[latent, drawn]
        most = Counter(ids.tolist()).most_common(TOKEN_FIGURES)
        return [
            [tokens.number(token), short(count / len(drawn)), short(float(values[ids == token].mean()))]
            for token, count in most
        ]

    def latent(self, latent: int, tokens: Strings, documents: dict[str, int]) -> Json:
        """Return all of one latent but what the summary has."""
        counts, bin_width = self.latents.collector.histogram(latent)
        ids, cosines = self.latents.near
        piece: Json = {
            "h": counts,
            "w": bin_width,
            "n": [[int(i), round(float(c), 3)] for i, c in zip(ids[latent], cosines[latent], strict=True)],
            "c": [[other, short(share)] for other, share in self.latents.together[latent]],
            "k": self.token_figures(latent, tokens),
            "b": self.latents.collector.fired_FP[latent].tolist(),
            "g": self.groups(latent, tokens, documents) if self.latents.collector.fired_F[latent] else [],
        }
        other = self.latents.other
        if other is not None:
            pairs = zip(other.near[0][latent].tolist(), other.near[1][latent].tolist(), strict=True)
            piece["x"] = [[i, round(cosine, 3), tokens.numbers(other.peaks[i])] for i, cosine in pairs]
        most, least = self.latents.reads or (None, None)
        every = (("r", self.latents.raised), ("l", self.latents.lowered), ("rm", most), ("rl", least))
        for name, ends in every:
            if ends is not None:
                both = zip(ends[0][latent], ends[1][latent], strict=True)
                piece[name] = [[tokens.number(int(token)), short(float(value))] for token, value in both]
        return piece

    def piece(self, first: int) -> Json:
        """Return the latents from `first` on, with the strings they need."""
        tokens, documents = Strings(self.latents.words.text), dict[str, int]()
        every = range(first, min(first + LATENTS_A_PIECE, self.latents.collector.width))
        latents = [self.latent(latent, tokens, documents) for latent in every]
        return {"latents": latents, "tokens": tokens.texts, "documents": list(documents)}

    def text(self, first: int, count: int) -> Json:
        """Return `count` whole contexts from context `first` on, and which of their tokens were not read."""
        tokens, packed = Strings(self.latents.words.text), self.latents.packed
        part = slice(first, first + count)
        left_out = [np.flatnonzero(~keep).tolist() for keep in packed.keep[part]]
        contexts = [tokens.numbers(ids.tolist()) for ids in packed.contexts[part]]
        return {"contexts": contexts, "left_out": left_out, "tokens": tokens.texts}

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
        _write_call(out / data_name("part", number), "piece", number, piece)
        bar(len(piece["latents"]))
    contexts, context = latents.packed.contexts.shape
    a_text = max(1, TOKENS_A_TEXT // context)
    for number, first in enumerate(range(0, contexts, a_text)):
        _write_call(out / data_name("text", number), "text", number, pieces.text(first, a_text))
    _write_call(out / "index.js", "index", pieces.summary())
    _write_call(out / LABELS_JS, "labels", {})
    for kind, count in (("part", -(-width // LATENTS_A_PIECE)), ("text", -(-contexts // a_text))):
        for stale in _beyond(out, kind, count):
            stale.unlink()
    other = latents.other
    page = {
        "about": about,
        "width": width,
        "tokens": latents.collector.tokens,
        "tokens_by_part": latents.collector.tokens_P.tolist(),
        "a_piece": LATENTS_A_PIECE,
        "a_text": a_text,
        "other": None if other is None else {"name": other.name, "path": other.path},
    }
    script = asset("features.js")
    html = render(
        "features.html", page=page, about=about, style=asset("base.css") + asset("features.css"), script=script,
        script_digest=script_hash(script),
    )  # fmt: skip
    write_atomic(out / "index.html", html)
    return out / "index.html"


def _write_call(path: Path, name: str, *values: Any) -> None:
    """Write a script that calls `thresher.<name>` with the values."""
    write_atomic(path, f"thresher.{name}({','.join(map(safe_json, values))});\n")


def _beyond(out: Path, kind: str, count: int) -> Iterator[Path]:
    """Find data files of an SAE with more of them that had its pages here before."""
    for path in out.glob(f"{kind}-*.js"):
        number = path.stem.removeprefix(f"{kind}-")
        if number.isdigit() and int(number) >= count:
            yield path
