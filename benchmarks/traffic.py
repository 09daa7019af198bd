"""How many operations a training step runs, how many bytes they move, and where the host waits for the device.

    python -m benchmarks.traffic                                  # the tables of benchmarks/RESULTS.md
    python -m benchmarks.traffic --variants topk --widths 12288 --dead 0.2 --list

Counted without a device, by shapes alone, on the GPU's path (benchmarks/counting.py): each operation reads its inputs
and writes its results once, but for sorts and torch.topk, which take several passes. Beside it the bytes of the
roofline (benchmarks/gpu/predictions.py), which leaves out the encoder's product: that is limited by its arithmetic.
"""

from __future__ import annotations

import argparse
from collections import Counter as Tally

from benchmarks.counting import L0_PER_K, Count, Shape, count_step, count_waits
from benchmarks.gpu.predictions import roofline_bytes
from benchmarks.memory import CHOOSING, VARIANTS

PARTS = ("products", "selection", "sparse products", "parameters", "z", "rest")


def least_bytes(shape: Shape) -> float:
    """Compute the roofline's bytes for a shape."""
    k = shape.k if shape.variant in CHOOSING else shape.l0
    return roofline_bytes(shape.batch, shape.d_model, shape.width, k)


def ratio(shape: Shape, count: Count) -> float:
    """Compute the bytes counted over the roofline's."""
    return sum(count.moved.values()) / least_bytes(shape)


def row(shape: Shape, count: Count) -> str:
    """Write one line of the table, in GB."""
    moved = count.moved
    cells = [shape.variant, f"{shape.width:,}", f"{shape.dead:,}", f"{len(count.operations)}"]
    cells += [f"{moved.get(part, 0) / 1e9:.2f}" for part in PARTS]
    cells += [f"{sum(moved.values()) / 1e9:.2f}", f"{least_bytes(shape) / 1e9:.2f}", f"{ratio(shape, count):.2f}"]
    return "| " + " | ".join(cells) + " |"


def listed(count: Count) -> str:
    """List the operations that move most."""
    bytes_of: Tally[tuple[str, str]] = Tally()
    times: Tally[tuple[str, str]] = Tally()
    for operation in count.operations:
        key = (operation.part, operation.name)
        bytes_of[key] += operation.read + operation.written
        times[key] += 1
    lines = [f"  {size / 1e9:8.3f} GB in {times[key]:3d}  {key[0]}: {key[1]}" for key, size in bytes_of.most_common(20)]
    return "\n".join(lines)


def waits_table() -> str:
    """Write what the host waits for, by variant and kind of step."""
    lines = ["| variant | plain step | step that looks for dead latents | logged step |", "| :-- | --: | --: | --: |"]
    for variant in VARIANTS:
        waits = count_waits(variant)
        lines.append(f"| {variant} | {len(waits['plain'])} | {len(waits['look'])} | {len(waits['logged'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--widths", nargs="+", type=int, default=[12_288, 49_152, 262_144, 1_048_576])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dead", type=float, default=0.0, help="share of latents that may be dead")
    parser.add_argument("--l0", type=int, help="latents active on a token of relu, jumprelu and gated: three times k")
    parser.add_argument(
        "--candidates", action="store_true", help="z is never written: a choice is made among candidates"
    )
    parser.add_argument("--list", action="store_true", help="the operations that move most")
    args = parser.parse_args()
    l0 = args.l0 or L0_PER_K * args.k
    print(f"d={args.d_model}, B={args.batch:,}, k={args.k} (L0 {l0} where k is not set), GB a step\n")
    print("| variant | F | may be dead | operations | " + " | ".join(PARTS) + " | all | roofline | ratio |")
    print("| :-- " + "| --: " * (len(PARTS) + 6) + "|")
    for variant in args.variants:
        for width in args.widths:
            dead = round(args.dead * width) if variant in CHOOSING else 0
            shape = Shape(variant, width, args.d_model, args.batch, args.k, args.l0, dead=dead)
            count = count_step(shape, candidates_from=0 if args.candidates else None)
            print(row(shape, count), flush=True)
            if args.list:
                print(listed(count))
    print("\nWaits of the host for the device:\n\n" + waits_table())


if __name__ == "__main__":
    main()
