"""How well the loader's order mixes: same-sequence companions per token in a batch, by the order alone.

    python -m benchmarks.shuffle [--rows 17_000_000] [--d-model 768] [--context 1024] [--memory-mb 800]

A companion of a token is another token of its sequence in the same batch. Ours (units of H rows permuted at harvest,
pools of K chunks dealt out in runs of 16 rows in the loader, two pools held) stands beside a uniform shuffle of
everything and beside a buffer of the same memory that is permuted and half drained over and over, as other libraries
mix. No activation is needed, so 17M tokens take a minute; 1e9 tokens are computed from the formula that the 17M test.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.base.seeded import Ints, seeded_permutation
from data.loading import order
from data.store.layout import ITEMSIZE, Layout, choose_layout
from data.store.manifest import TRAIN

BATCH = 4096
Labels = NDArray[np.int32]  # the sequence of each row


@dataclass(frozen=True)
class Setting:
    """What is mixed: N `rows` of sequences of `context` tokens, `row_bytes` each."""

    rows: int
    context: int
    row_bytes: int
    layout: Layout

    @property
    def sizes(self) -> Ints:
        """Return the valid rows of each chunk."""
        per = self.layout.chunk_rows
        return np.array([min(per, self.rows - at) for at in range(0, self.rows, per)], np.int64)

    def pool_bytes(self, pool_chunks: int) -> int:
        """Return both of the loader's buffers."""
        return 2 * pool_chunks * self.layout.chunk_rows * self.row_bytes


def companions(batches: Iterator[Labels]) -> float:
    """Return the mean over tokens of the other tokens of its sequence in its batch."""
    pairs, tokens = 0, 0
    for batch in batches:
        _, counts = np.unique(batch, return_counts=True)
        pairs += int((counts * (counts - 1)).sum())
        tokens += len(batch)
    return pairs / tokens


def cut(labels: Labels) -> Iterator[Labels]:
    return (labels[at : at + BATCH] for at in range(0, len(labels) - BATCH + 1, BATCH))


def stored(setting: Setting) -> Labels:
    """Return the sequence of each row as it lies in the store: permuted within its unit."""
    parts, unit_rows = [], setting.layout.unit_rows
    for unit, at in enumerate(range(0, setting.rows, unit_rows)):
        n = min(unit_rows, setting.rows - at)
        rows = at + seeded_permutation(n, "mixing", setting.layout.mixing_seed, TRAIN, unit)
        parts.append((rows // setting.context).astype(np.int32))
    return np.concatenate(parts)


def ours(setting: Setting, labels: Labels, pool_chunks: int) -> Iterator[Labels]:
    """Yield the loader's batches (no rank, epoch 0)."""
    per, rest = setting.layout.chunk_rows, np.empty(0, np.int32)
    for pool in order.pools(setting.sizes, seed=0, epoch=0, rank=0, world=1, pool_chunks=pool_chunks):
        rows = np.concatenate([labels[chunk * per : chunk * per + per] for chunk in pool.chunks])
        sizes = setting.sizes[pool.chunks]
        runs = order.pool_runs(pool, seed=0, epoch=0, rank=0)
        mixed = np.concatenate([rest, rows[runs.indices(np.cumsum(sizes) - sizes)]])
        yield from cut(mixed)
        rest = mixed[len(mixed) // BATCH * BATCH :]


def half_drained(setting: Setting, buffer_rows: int) -> Iterator[Labels]:
    """Pass rows in the text's order through a buffer: fill it, permute it, serve half of it, fill it again."""
    rng, at = np.random.default_rng(0), 0
    held, half = np.empty(0, np.int32), buffer_rows // 2 // BATCH * BATCH
    while at < setting.rows:
        n = min(buffer_rows - len(held), setting.rows - at)
        held = np.concatenate([held, (np.arange(at, at + n) // setting.context).astype(np.int32)])
        at += n
        held = held[rng.permutation(len(held))]
        yield from cut(held[:half])
        held = held[half:]


def uniform(setting: Setting) -> float:
    """Return the expected companions in a uniform shuffle of all rows."""
    return (BATCH - 1) * (setting.context - 1) / (setting.rows - 1)


def computed(setting: Setting, pool_chunks: int) -> float:
    """Return the expected companions of ours: of a batch's rows,
    those of the own chunk and those of other chunks of its unit.

    A batch is a window of W = B/16 runs; each of K chunks has one run at a random place in every K runs. Two runs of a
    chunk are d < K apart as often as d/K of what chance alone gives, so a window that holds a run holds
    W/K + K/(3W) runs of its chunk, itself among them (1 + W^2/(3 K^2) where W < K).
    """
    layout, chunks = setting.layout, len(setting.sizes)
    pool_chunks, window = min(pool_chunks, chunks), BATCH / order.RUN_ROWS
    ratio = window / pool_chunks
    own = min(order.RUN_ROWS * (ratio + 1 / (3 * ratio) if ratio > 1 else 1 + ratio**2 / 3), layout.chunk_rows)
    siblings = (layout.chunks_per_unit - 1) / max(chunks - 1, 1)  # of other chunks, those of the same unit
    return (own - 1 + (BATCH - own) * siblings) * (setting.context - 1) / (layout.unit_rows - 1)


def setting_of(rows: int, d_model: int, context: int, dtype: str) -> Setting:
    """Return the setting with the layout that a harvest of this size and one site chooses by itself."""
    chosen = choose_layout(
        rows=rows,
        d_model=d_model,
        n_sites=1,
        context=context,
        dtype=dtype,
        mixing_seed=0,
        chunk_rows=None,
        chunks_per_unit=None,
    )
    return Setting(rows // context * context, context, d_model * ITEMSIZE[dtype], chosen)


def simulated(setting: Setting, pool_sizes: list[int], memory: int, show: Callable[[str], None]) -> None:
    """Print the table of one size, each line measured on the order itself."""
    floor, labels = uniform(setting), stored(setting)
    show(f"{'':<44}{'memory':>9}{'companions':>12}{'above uniform':>15}{'computed':>10}")
    mixed = labels[seeded_permutation(len(labels), "uniform")]
    measured = companions(cut(mixed))
    show(f"{'uniform shuffle of all rows':<44}{'all':>9}{measured:>12.3f}{measured - floor:>15.3f}{floor:>10.3f}")
    for pool_chunks in pool_sizes:
        got = companions(ours(setting, labels, pool_chunks))
        name, held = f"ours, pools of {pool_chunks} chunks", f"{setting.pool_bytes(pool_chunks) / 1e6:.0f} MB"
        show(f"{name:<44}{held:>9}{got:>12.3f}{got - floor:>15.3f}{computed(setting, pool_chunks):>10.3f}")
    for rows in sorted({262_144, memory // setting.row_bytes}):
        got = companions(half_drained(setting, rows))
        name, held = f"half-drained buffer of {rows:,} rows", f"{rows * setting.row_bytes / 1e6:.0f} MB"
        show(f"{name:<44}{held:>9}{got:>12.3f}{got - floor:>15.3f}")


def fewest(setting: Setting, most: float) -> int:
    """Return the smallest pool, in chunks, with at most `most` companions above uniform."""
    sizes = range(1, len(setting.sizes) + 1)
    return next(chunks for chunks in sizes if computed(setting, chunks) - uniform(setting) <= most)


def main() -> None:
    parser = argparse.ArgumentParser(description="Same-sequence companions per token in batches of 4096.")
    parser.add_argument("--rows", type=int, default=17_000_000)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=list(ITEMSIZE))
    parser.add_argument("--memory-mb", type=int, default=800, help="for the loader's two buffers, or the one buffer")
    parser.add_argument("--goal", type=float, default=0.2, help="companions above uniform")
    args = parser.parse_args()
    memory = args.memory_mb * 10**6
    for rows, measure in ((args.rows, True), (10**9, False)):
        setting = setting_of(rows, args.d_model, args.context, args.dtype)
        layout, floor = setting.layout, uniform(setting)
        chunk_bytes = layout.chunk_rows * setting.row_bytes
        goal = fewest(setting, args.goal)
        pool_sizes = sorted({16, 32, goal, max(1, memory // (2 * chunk_bytes))})
        print(
            f"{setting.rows:,} rows, contexts of {setting.context}: units of {layout.unit_rows:,} rows (H) in "
            f"{layout.chunks_per_unit} chunks of {layout.chunk_rows:,} ({chunk_bytes / 1e6:.1f} MB); "
            f"{args.goal:g} above uniform from {goal} chunks on ({setting.pool_bytes(goal) / 1e6:.0f} MB)"
        )
        if measure:
            simulated(setting, pool_sizes, memory, print)
            continue
        for pool_chunks in pool_sizes:
            got, held = computed(setting, pool_chunks), setting.pool_bytes(pool_chunks) / 1e6
            print(f"computed: pools of {pool_chunks} chunks, {held:.0f} MB: {got:.3f}, {got - floor:.3f} above uniform")


if __name__ == "__main__":
    main()
