"""The pages' data: what a reader of the files finds is what was collected, in pieces, and no text is ever markup."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from evaluate.features import pages
from evaluate.features.collect import Collector
from evaluate.features.pages import Words, nearest, short
from evaluate.report.render import safe_json
from tests.helpers.pages import HOSTILE, Tokenizer, a_page, called


def test_safe_json_is_the_value_without_any_markup() -> None:
    text = safe_json(HOSTILE)
    assert json.loads(text) == HOSTILE
    assert text.isascii() and not set("<>&") & set(text)
    with pytest.raises(ValueError, match="JSON"):
        safe_json(float("nan"))


def test_no_file_holds_hostile_text_as_markup(tmp_path: Path) -> None:
    _, index = a_page(tmp_path)
    for path in tmp_path.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "\u2028" not in text and "<img" not in text
        assert "window.hacked=1</script>" not in text and "<script>window" not in text
        if path.suffix == ".js":
            assert "<" not in text
    assert "&lt;script&gt;window.hacked=1&lt;/script&gt;" in index.read_text()


def test_a_pages_numbers_are_what_was_collected(tmp_path: Path) -> None:
    latents, _ = a_page(tmp_path)
    found, contexts = latents.collector, latents.packed.contexts
    (index,) = called(tmp_path / "index.js")
    number, piece = called(tmp_path / "part-000.js")
    assert number == 0 and len(piece["latents"]) == 5
    assert index["fired"] == found.fired_F.tolist() and index["contexts"] == found.contexts_F.tolist()
    assert index["max"] == [short(float(v)) for v in found.largest_F]
    assert index["peaks"][0] == [] and index["max"][0] == 0 and piece["latents"][0]["g"] == []
    for latent in range(1, 5):
        page = piece["latents"][latent]
        assert sum(page["h"]) == found.fired_F[latent]
        assert page["n"] == [[(latent + 1) % 5, 0.5]]
        assert page["b"] == found.fired_FP[latent].tolist() and sum(page["b"]) == found.fired_F[latent]
        assert sum(share for _, share, _ in page["k"]) == pytest.approx(1, abs=0.02)  # all of 4 drawn firings
        assert [other for other, _ in page["c"]] == [other for other, _ in latents.together[latent]]
        assert [piece["tokens"][t] for t, _ in page["r"]] == [latents.words.text(i) for i in latents.raised[0][latent]]  # type: ignore[index]
        top, *quantiles = page["g"]
        assert len(top["c"]) == 2 and [g["q"] for g in quantiles] == [0.9, 0.5]
        for example in (example for group in page["g"] for example in group["c"]):
            s, t = example["s"]
            around = range(max(0, t - 2), min(8, t + 3))
            assert [piece["tokens"][i] for i in example["t"]] == [latents.words.text(contexts[s, u]) for u in around]
            assert example["p"] == t - around[0]
            values = dict(zip(example["a"][::2], example["a"][1::2], strict=True))
            assert values[example["p"]] > 0 and max(values.values()) <= index["max"][latent]
            elsewhere = dict(zip(example["o"][::2], example["o"][1::2], strict=True))
            assert not set(elsewhere) & set(around)
            shown = {around[0] + place: value for place, value in values.items()} | elsewhere
            assert shown == whole_context(found, latent, s, t)
            assert piece["documents"][example["d"]] == latents.packed.document(s, t)
        shown = [tuple(example["s"]) for group in page["g"] for example in group["c"]]
        assert len(shown) == len(set(shown))


def whole_context(found: Collector, latent: int, sequence: int, position: int) -> dict[int, float]:
    """Where the latent fires in the context of an example, in three digits."""
    for shelf in (found.top, found.sample):
        for place in range(shelf.places):
            if (shelf.sequence_FK[latent, place], shelf.position_FK[latent, place]) == (sequence, position):
                positions, values = shelf.whole_FK[latent, place]
                return {int(at): short(float(value)) for at, value in zip(positions, values, strict=True)}
    raise AssertionError("no such example")


def test_whole_contexts_stand_beside_the_latents(tmp_path: Path) -> None:
    latents, _ = a_page(tmp_path)
    number, text = called(tmp_path / "text-000.js")
    assert number == 0 and text["left_out"] == [[0]] * 6
    shown = [[text["tokens"][i] for i in ids] for ids in text["contexts"]]
    assert shown == [[latents.words.text(i) for i in ids] for ids in latents.packed.contexts]
    part = pages.Pieces(latents).text(2, 3)
    assert [[part["tokens"][i] for i in ids] for ids in part["contexts"]] == shown[2:5]


def test_larger_dictionaries_come_in_pieces_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LATENTS_A_PIECE", 3)
    a_page(tmp_path, 11)
    assert sorted(path.name for path in tmp_path.glob("part-*")) == [f"part-{i:03d}.js" for i in range(4)]
    pieces = [called(tmp_path / f"part-{i:03d}.js") for i in range(4)]
    assert [number for number, _ in pieces] == [0, 1, 2, 3]
    assert [len(piece["latents"]) for _, piece in pieces] == [3, 3, 3, 2]
    a_page(tmp_path, 4)
    names = ["index.html", "index.js", "labels.js", "part-000.js", "part-001.js", "text-000.js"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_examples_nearest_to_each_quantile_none_twice() -> None:
    values = np.array([5.0, 1.0, 3.0, 2.0, 4.0], np.float32)
    assert nearest(values, [4.4, 3.0, 1.0], 2) == [[4, 0], [2, 3], [1]]
    assert nearest(values[:0], [1.0], 2) == [[]]


def test_a_sentencepiece_keeps_the_space_it_begins_with() -> None:
    words = Words(Tokenizer())
    assert words.text(1) == " " + HOSTILE[1] and words.text(0) == HOSTILE[0]
