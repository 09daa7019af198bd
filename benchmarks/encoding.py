"""python -m benchmarks.encoding: what each form of storage adds in error and takes in bytes, on real activations.

Harvests in memory, site by site, over all kinds and several layers of the embedded model and of a folder with
stories260K, and prints the NMSE that storage adds, E||x - x'||^2 / E||x - E x||^2, and the bytes of a token. int8's
mean and deviation are from the first rows, as in a store, and the error is over all. BitRound, which saves nothing by
itself, is shown with the codec that makes it smallest: it was a form of storage until this table spoke against it.
Exits 1 where int8 adds more than 1e-4.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.base.sites import STREAM_KINDS, Site
from data.store.chunk_codec import ChunkCodec
from data.store.int8 import PILOT_ROWS, FeatureScale, RowDecoder, encode_int8
from data.store.layout import CODECS, Layout
from data.store.manifest import TRAIN
from data.store.zarr_bfloat16 import from_float32, to_float32
from harvest import lm
from harvest.documents import source_from
from harvest.hooks import run_to
from harvest.packing import Packing, pack

GOAL = 1e-4
BITS = 3  # of mantissa: with a codec about the bytes of int8
LM_BATCH = 16
Floats = NDArray[np.float32]


def activations(name: str, text: Mapping[str, Any], rows: int, every: int) -> Iterator[tuple[str, Floats]]:
    """Yield (site, [N, D]) of all kinds at every `every`-th layer and the last."""
    settings = {"name": name, "revision": None, "dtype": "float32", "device": "cpu"}
    tokenizer, model = lm.load_tokenizer(settings), lm.load_model(settings)
    packed = pack(source_from(text), tokenizer, Packing(context=256, bos="document", shuffle=None), TRAIN, rows)
    layers = int(model.config.num_hidden_layers)
    sites = [f"{kind}.{layer}" for kind in STREAM_KINDS for layer in sorted({*range(0, layers, every), layers - 1})]
    held: dict[str, list[Floats]] = {site: [] for site in sites}
    for first in range(0, len(packed.contexts), LM_BATCH):
        batch = slice(first, first + LM_BATCH)
        seen = run_to(model, [Site.parse(site) for site in sites], torch.from_numpy(packed.contexts[batch]).long())
        for site in sites:
            held[site].append(seen[site][torch.from_numpy(packed.keep[batch])].numpy())
    for site in sites:
        yield site, np.concatenate(held.pop(site))


def added(x: Floats, stored: Floats) -> float:
    """Return the NMSE of `stored`."""
    wide = x.astype(np.float64)
    return float(np.square(wide - stored).sum() / np.square(wide - wide.mean(0)).sum())


def rounded(bits: NDArray[np.uint16], mantissa: int) -> NDArray[np.uint16]:
    """Return bfloat16 rows with so many bits of mantissa left: what int8 is compared with."""
    from numcodecs.bitround import BitRound

    kept: Floats = BitRound(mantissa).encode(to_float32(bits))
    return (kept.view(np.uint32) >> 16).astype(np.uint16)  # what is left fits: nothing is rounded twice


def token_bytes(rows: NDArray[Any], codec: str | None) -> float:
    """Return the bytes a row takes in chunks of 4096."""
    layout = Layout("float32", 1, 4096, 1, 0, codec=codec)
    files = ChunkCodec(layout, rows.dtype, rows.shape[1:])
    whole = rows[: len(rows) // 4096 * 4096].reshape(-1, 4096, rows.shape[1])
    return sum(len(piece) for chunk in whole for piece in files.encode([chunk])) / (len(whole) * 4096)


def absmax(x: Floats) -> Floats:
    """Return plain int8: each row by its own largest value, nothing known of the dimensions."""
    scale = np.abs(x).max(1, keepdims=True) / 127
    return np.asarray(np.rint(x / scale) * scale, np.float32)


def figures(x: Floats) -> dict[str, float]:
    """Return a line of the table."""
    bits = from_float32(x)
    standard = FeatureScale.of(x[:PILOT_ROWS])
    rows = encode_int8(torch.from_numpy(x), standard)
    kept = rounded(bits, BITS)
    return {
        "bf16": added(x, to_float32(bits)),
        "int8": added(x, RowDecoder(x.shape[1], standard)(rows).numpy()),
        "absmax": added(x, absmax(x)),
        "bitround": added(x, to_float32(kept)),
        **{f"bf16 {codec or 'bytes'}": token_bytes(bits, codec) for codec in (None, *CODECS)},
        **{f"int8 {codec or 'bytes'}": token_bytes(rows.numpy(), codec) for codec in (None, *CODECS)},
        "bitround bytes": min(token_bytes(kept, codec) for codec in CODECS),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--every", type=int, default=2, help="layers between those looked at")
    parser.add_argument(
        "--stories", type=Path, default=Path("../shared/lm/stories260K"), help="a folder with that model"
    )
    parser.add_argument("--text", type=Path, default=Path("../shared/text/tinystories.jsonl"), help="what it reads")
    options = parser.parse_args()
    texts: dict[str, dict[str, Any]] = {"embedded": {"kind": "stdlib", "root": None}}
    texts[str(options.stories)] = {"kind": "files", "paths": [str(options.text)], "field": "text"}
    worst = 0.0
    for name, text in texts.items():
        if absent := [path for path in (options.stories, options.text) if name != "embedded" and not path.exists()]:
            print(f"{name}: left out, for {absent[0]} is not there (--stories, --text)")
            continue
        for number, (site, x) in enumerate(activations(name, text, options.rows, options.every)):
            errors = figures(x)
            if not number:
                print(
                    f"{name}: D={x.shape[1]}, {len(x):,} rows; NMSE added, then bytes a token (float32: {x[0].nbytes})"
                )
                print("".join([f"{'site':<14}", *(f"{column:>15}" for column in errors)]))
            cells = (f"{value:>15.1e}" if value < 1 else f"{value:>15.1f}" for value in errors.values())
            print(f"{site:<14}{''.join(cells)}", flush=True)
            worst = max(worst, errors["int8"])
    print(f"int8 adds at most {worst:.1e} (goal: {GOAL:g})")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
