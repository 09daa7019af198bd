"""The pages' data: what a reader of the files finds is what was collected, in pieces, and no text is ever markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluate.features import pages
from evaluate.features.collect import Collector
from evaluate.features.pages import Latents, Words, nearest, short, write
from evaluate.report.render import safe_json
from harvest.packing import PackedTokens

HOSTILE = [
    "<script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=1</script>",
    "\u2028\u2029",
    "${window.hacked=1}`'\"\\",
    "<!--<script>",
    "{{ 7*7 }}",
]


class Tokenizer:
    """Token i is the i-th hostile text."""

    def decode(self, ids: list[int], **settings: Any) -> str:
        return HOSTILE[ids[0] % len(HOSTILE)]

    def convert_ids_to_tokens(self, token: int) -> str:
        return "▁" if token == 1 else "x"


def a_page(out: Path, width: int = 5) -> tuple[Latents, Path]:
    """Pages of random latents over a text of hostile tokens in a hostile document; latent 0 is silent."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(6, 8, width, generator=g).relu()
    f[..., 0] = 0
    keep = torch.ones(6, 8, dtype=torch.bool)
    keep[:, 0] = False
    found = Collector(width, top=2, sample=4, before=2, after=2, seed=0)
    found.update(f[keep], keep, 0)
    contexts = torch.randint(7, (6, 8), generator=g).to(torch.int32).numpy()
    packed = PackedTokens(contexts, keep.numpy(), np.array([0, 20]), [HOSTILE[0], HOSTILE[2]], 8)
    ids = torch.arange(width * 3).reshape(width, 3).numpy() % len(HOSTILE)
    ends = (ids, torch.randn(width, 3, generator=g).numpy())
    near = (np.array([[(i + 1) % width] for i in range(width)]), np.full((width, 1), 0.5, np.float32))
    latents = Latents(found, packed, Words(Tokenizer()), near, ends, ends, (0.9, 0.5), 2)
    about = {
        **{"variant": HOSTILE[0], "width": width, "site": HOSTILE[1], "model": HOSTILE[2], "store": "s"},
        **{
            "fingerprint": "f" * 64,
            "folder": HOSTILE[0],
            "tokens": found.tokens,
            "special": False,
            "contexts": 6,
            "silent": 1,
        },
        **{"sample": 4, "seed": 0, "logits": True, "settings": {"a": HOSTILE[2]}},
    }
    return latents, write(latents, about, out, lambda count: None)


def called(path: Path) -> Any:
    """The arguments of the one call that a data script is."""
    match = re.fullmatch(r"thresher\.(?:index|piece)\((.*)\);\n", path.read_text(encoding="utf-8"))
    assert match
    return json.loads(f"[{match[1]}]")


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
    found, contexts = latents.found, latents.packed.contexts
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
            assert piece["documents"][example["d"]] == latents.packed.document(s, t)
        shown = [tuple(example["s"]) for group in page["g"] for example in group["c"]]
        assert len(shown) == len(set(shown))


def test_larger_dictionaries_come_in_pieces_and_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LATENTS_A_PIECE", 3)
    a_page(tmp_path, 11)
    assert sorted(path.name for path in tmp_path.glob("part-*")) == [f"part-{i:03d}.js" for i in range(4)]
    pieces = [called(tmp_path / f"part-{i:03d}.js") for i in range(4)]
    assert [number for number, _ in pieces] == [0, 1, 2, 3]
    assert [len(piece["latents"]) for _, piece in pieces] == [3, 3, 3, 2]
    a_page(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "index.js", "part-000.js", "part-001.js"]


def test_examples_nearest_to_each_quantile_none_twice() -> None:
    values = np.array([5.0, 1.0, 3.0, 2.0, 4.0], np.float32)
    assert nearest(values, [4.4, 3.0, 1.0], 2) == [[4, 0], [2, 3], [1]]
    assert nearest(values[:0], [1.0], 2) == [[]]


def test_a_sentencepiece_keeps_the_space_it_begins_with() -> None:
    words = Words(Tokenizer())
    assert words.text(1) == " " + HOSTILE[1] and words.text(0) == HOSTILE[0]
