"""Plant one damage at a time in a store, and undo it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.store.int8 import FeatureScale
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from tests.data.conftest import manifest

SITES = {"resid_post.1": 3, "attn_out.0": 5}
ROWS = {TRAIN: [16, 16, 9], HELDOUT: [16, 5]}


def harvested(cache: Path, dtype: str = "bfloat16", **layout: object) -> Store:
    """A complete store of two splits and two sites, as a harvest leaves it; no two chunks are alike."""
    base, rng = manifest(dtype), np.random.default_rng(0)
    store = Store.create_or_open(cache, replace(base, identity={"layout": replace(base.layout, **layout).json}))
    for split, units in ROWS.items():
        begin = 0
        for name, width in {**SITES, TOKENS: 1, ORIGIN: 2}.items():
            pilot = FeatureScale.of(np.random.default_rng(width).standard_normal((9, width)).astype(np.float32))
            store.require(split, name, width, len(units) * store.layout.unit_rows, pilot)
        for unit, n in enumerate(units):
            order = store.permutation(split, unit, n)
            for site, width in SITES.items():
                x = rng.standard_normal((n, width)).astype(np.float32)
                bits = (x.view(np.uint32) >> 16).astype(np.uint16)
                store.write(split, unit, site, bits if dtype == "bfloat16" else x.astype(dtype), {"device": "cpu"})
            rows = begin + np.arange(n)[order]
            origin = np.stack([rows // 8, rows % 8], 1).astype(np.int32)
            store.write(split, unit, TOKENS, rng.integers(0, 9999, n).astype(np.int32), {"device": "cpu"})
            store.write(split, unit, ORIGIN, origin, {"device": "cpu"})
            begin += n
    store.mark_complete(lambda: {split: {site: store.rows(split, site) for site in SITES} for split in ROWS})
    return store


def _files(root: Path, pattern: str) -> list[Path]:
    return sorted(path for path in root.rglob(pattern) if path.is_file())


def _kinds(root: Path) -> list[list[Path]]:
    """Files by what they are, so that the few records are hit as often as the many chunks."""
    return [
        _files(root, "c.*"),
        _files(root / "commits", "*.json"),
        [root / "manifest.json"],
        [root / "complete.json"],
        _files(root, "zarr.json"),
    ]


def flip(root: Path, rng: random.Random) -> list[Path]:
    path = rng.choice(rng.choice(_kinds(root)))
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return [path]


def truncate(root: Path, rng: random.Random) -> list[Path]:
    path = rng.choice(rng.choice(_kinds(root)))
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return [path]


def swap_chunks(root: Path, rng: random.Random) -> list[Path]:
    return _swap(rng.sample(_files(root, "c.*"), 2))


def swap_records(root: Path, rng: random.Random) -> list[Path]:
    return _swap(rng.sample(_files(root / "commits", "*.json"), 2))


def _swap(pair: list[Path]) -> list[Path]:
    contents = [path.read_bytes() for path in pair]
    assert contents[0] != contents[1]
    for path, content in zip(pair, reversed(contents), strict=True):
        path.write_bytes(content)
    return pair


def lose_chunk(root: Path, rng: random.Random) -> list[Path]:
    return _lose(rng.choice(_files(root, "c.*")))


def lose_record(root: Path, rng: random.Random) -> list[Path]:
    return _lose(rng.choice(_files(root / "commits", "*.json")))


def lose_metadata(root: Path, rng: random.Random) -> list[Path]:
    return _lose(rng.choice([root / "manifest.json", *_files(root, "zarr.json")]))


def _lose(path: Path) -> list[Path]:
    path.unlink()
    return [path]


Damage = Callable[[Path, random.Random], list[Path]]
DAMAGES: list[Damage] = [flip, truncate, swap_chunks, swap_records, lose_chunk, lose_record, lose_metadata]


def restore(root: Path, contents: dict[Path, bytes]) -> None:
    """Give every file the bytes it had."""
    for path, content in contents.items():
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
