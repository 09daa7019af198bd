"""What the cells of `benchmarks.step` say: a table of each, and the goals met and missed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.contestants.process import ENTRIES, FLOOR, OURS
from benchmarks.contestants.spec import Spec

Cell = dict[str, Any]  # {"spec", "threads", "machine", "torch", "allocator" of peers, "rows": {contestant: row}}
Row = dict[str, Any]  # {"ms": a round each, "steps", "peak_mb", "device_mb", "facts"} or {"failed": why}


def ratio(row: Row, over: Row) -> float:
    """Return the median over the rounds of both of one's time over the other's."""
    return float(statistics.median(a / b for a, b in zip(row["ms"], over["ms"], strict=False)))


def valid(cell: Cell) -> dict[str, Row]:
    return {name: row for name, row in cell["rows"].items() if "failed" not in row}


def fastest_peer(cell: Cell, among: Iterable[str] | None = None) -> str | None:
    """Return the peer with the least median time, of those that finished."""
    rows = valid(cell)
    peers = [name for name in rows if ENTRIES[name].peer and (among is None or name in among)]
    return min(peers, key=lambda name: statistics.median(rows[name]["ms"])) if peers else None


def memory(cell: Cell, name: str) -> float:
    """Return MB above the start: of the device where there is one."""
    row: Row = cell["rows"][name]
    return float(row["device_mb"] or row["peak_mb"])


def title(cell: Cell) -> str:
    spec = Spec(**cell["spec"])
    sparsity = f"k={spec.k}" if spec.activity == spec.k else f"L0={spec.l0:g}"
    place = f"{cell['machine']}, {cell['threads']} threads, {spec.precision}, torch {cell['torch']}"
    if cell["allocator"] == "ours":
        place += ", peers keeping freed memory as ours"
    sizes = f"d={spec.d_model} F={spec.width} B={spec.batch} {sparsity}, {spec.dead:.0%} dead"
    return f"{spec.variant}: {sizes} ({place})"


def _line(cell: Cell, name: str, row: Row, fastest: str | None) -> str:
    rows = valid(cell)
    if "failed" in row:
        return f"{name:<30} failed: {row['failed'][:110]}"
    ms, facts = row["ms"], row["facts"]
    line = f"{name:<30}{statistics.median(ms):>10.1f}{min(ms):>10.1f}{max(ms):>10.1f}{len(ms):>4} x{row['steps']:<3}"
    line += f"{ratio(rows[fastest], row):>10.2f}" if fastest else f"{'-':>10}"
    line += f"{ratio(row, rows[FLOOR]):>9.2f}" if FLOOR in rows else f"{'-':>9}"
    line += f"{row['peak_mb']:>10.0f}{row['device_mb']:>10.0f}"
    return line + f"{facts['l0']:>9.1f}{facts['dead']:>8.0f}{facts['auxk']:>10.2g}"


def show(cell: Cell) -> str:
    """Return the cell's table. `speed-up`: the fastest peer's time over this one's;
    `floors`: this one's over the floor's."""
    fastest = fastest_peer(cell)
    head = f"{'':<30}{'ms a step':>10}{'least':>10}{'most':>10}{'rounds':>8}{'speed-up':>10}{'floors':>9}"
    head += f"{'peak MB':>10}{'GPU MB':>10}{'L0':>9}{'dead':>8}{'AuxK':>10}"
    lines = [title(cell), head] + [_line(cell, name, row, fastest) for name, row in cell["rows"].items()]
    facts = valid(cell).get(FLOOR, {}).get("facts")
    if facts:
        lines.append(
            f"roofline {facts['roofline_ms']:.1f} ms: the encoder's product at {facts['tflops']:.3g} TFLOP/s measured, "
            f"Adam's bytes at {facts['gb_s']:.3g} GB/s"
        )
    return "\n".join(lines)


def _verdict(what: str, reached: float, goal: float, *, most: bool) -> str:
    met = reached <= goal if most else reached >= goal
    return f"{'met' if met else 'MISSED':<7}{what}: {reached:.2f} (goal: at {'most' if most else 'least'} {goal:g})"


_SPEED_UP = {
    ("batchtopk", 0.0): 7.0,
    ("batchtopk", 0.2): 5.0,
    ("topk", 0.0): 2.5,
    ("relu", 0.0): 2.5,
    ("gated", 0.0): 2.5,
    ("jumprelu", 0.0): 2.5,
}


def _on_cpu(cell: Cell, spec: Spec, fastest: str) -> list[str]:
    rows, lines = valid(cell), []
    if (goal := _SPEED_UP.get((spec.variant, spec.dead))) and spec.batch == 4096:
        lines.append(_verdict(f"times faster than {fastest}", ratio(rows[fastest], rows[OURS]), goal, most=False))
    if spec.variant in ("topk", "batchtopk") and not spec.dead and spec.batch == 4096 and FLOOR in rows:
        lines.append(_verdict("times the sparse floor", ratio(rows[OURS], rows[FLOOR]), 1.25, most=True))
    return lines


def _on_gpu(cell: Cell, spec: Spec, fastest: str) -> list[str]:
    rows, lines = valid(cell), []
    if spec.variant not in ("topk", "batchtopk") or spec.dead:
        return []
    goal = 3.0 if spec.width >= 65_536 else 1.5
    lines.append(_verdict(f"times faster than {fastest}", ratio(rows[fastest], rows[OURS]), goal, most=False))
    if FLOOR in rows:
        over = statistics.median(rows[OURS]["ms"]) / rows[FLOOR]["facts"]["roofline_ms"]
        lines.append(_verdict("times the roofline", over, 1.5 if spec.width >= 49_152 else 2.0, most=True))
    return lines


def goals(cells: Iterable[Cell]) -> list[str]:
    """Return a line for each goal that a cell decides; TopK's is against sparsify."""
    lines = []
    for cell in cells:
        spec, rows = Spec(**cell["spec"]), valid(cell)
        among = ("sparsify", "sparsify-adam") if spec.variant == "topk" else None
        fastest = fastest_peer(cell, among)
        if OURS not in rows or fastest is None:
            continue
        verdicts = (_on_cpu if spec.device == "cpu" else _on_gpu)(cell, spec, fastest)
        leanest = min((name for name in rows if ENTRIES[name].peer), key=lambda name: memory(cell, name))
        share = memory(cell, OURS) / memory(cell, leanest)
        verdicts.append(_verdict(f"of {leanest}'s memory, the leanest", share, 0.75, most=True))
        lines += [f"{spec.variant} B={spec.batch} F={spec.width} {spec.dead:.0%} dead: {line}" for line in verdicts]
    return lines
