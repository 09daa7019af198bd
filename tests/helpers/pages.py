"""Feature pages over hostile text, and what their data scripts hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluate.features.collect import Collector
from evaluate.features.pages import Latents, OtherSAE, Words, write_pages
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


def a_page(out: Path, width: int = 5, other: OtherSAE | None = None, site: str = HOSTILE[1]) -> tuple[Latents, Path]:
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
    together = found.together.neighbours(3)
    latents = Latents(found, packed, Words(Tokenizer()), near, ends, ends, (0.9, 0.5), 2, together, other)
    about = {
        **{"variant": HOSTILE[0], "width": width, "site": site, "model": HOSTILE[2], "store": "s"},
        **{
            "fingerprint": "f" * 64,
            "folder": HOSTILE[0],
            "tokens": found.tokens,
            "special": False,
            "massive": 0,
            "contexts": 6,
            "silent": 1,
        },
        **{"sample": 4, "seed": 0, "logits": True, "together": 0.5, "report": None, "settings": {"a": HOSTILE[2]}},
    }
    return latents, write_pages(latents, about, out, lambda count: None)


def called(path: Path) -> Any:
    """The arguments of the one call that a data script is."""
    match = re.fullmatch(r"thresher\.(?:index|piece|text|labels)\((.*)\);\n", path.read_text(encoding="utf-8"))
    assert match
    return json.loads(f"[{match[1]}]")
