"""What a training step needs of a device's memory, by formula, beside what is counted of a step.

    python -m benchmarks.memory                                   # the table of benchmarks/RESULTS.md
    python -m benchmarks.memory --variants topk --widths 1048576 --d-model 2304 --dead 0.2 --batch 8192

Counted without a device, by shapes alone, on the GPU's path (benchmarks/counting.py). What a kernel of torch's or of
cuBLAS reserves for itself is not in it, nor are the CUDA context (about 0.5 GB) and what the allocator cannot use.
Letters: B tokens in a batch, D model width, F latents, n = k B entries (of the variants with a bound L0 B), d latents
that may be dead, P prefixes.
"""

from __future__ import annotations

import argparse
import math

from benchmarks.counting import Shape, count_step
from train.sae.parts.auxk import auxk_size
from train.sae.sparse.above import PIECE_LATENTS
from train.sae.sparse.triton import TritonBackend

VARIANTS = ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated")
CHOOSING = ("topk", "batchtopk", "matryoshka")
BIASES = {"jumprelu": 2, "gated": 3}
"""Vectors [F] among the parameters; one of the other variants."""
MOMENTS = {"adam": 8.0, "adam8bit": 2 * (1 + 4 / 256)}
"""Bytes of an optimizer's state an entry: two float32, or two of 8 bits with a float32 scale for 256 of them."""
PREFIXES = 5
GROUP = 32  # latents of which the first choice looks at the largest
LOOKED_AT = 7  # bytes an entry that a choice looks at: a running count in int32 and three marks
LARGEST = 4 + LOOKED_AT  # a group: the largest of it too
NEAR = 8 + 4 + LOOKED_AT  # an entry of a chosen group: its place and value too
BY_LATENT = 20  # bytes a latent: where its entries and its pieces end, the sum of its gradients
# What lives beside the state where the loss of a variant with a bound has most: z and its kin, a mask of it, [F, D].
DENSE = {"relu": (3.0, 3), "jumprelu": (5.25, 1), "gated": (7.25, 1)}
# The same where what is above the bound is sparse: bytes an entry, and [F, D]; then at the gradients bytes an entry and
# a latent, and [F, D].
LOSS = {"relu": (44, 0), "jumprelu": (60, 1), "gated": (69, 0)}
GRADIENTS = {"relu": (36, 16, 3), "jumprelu": (32, 24, 2), "gated": (32, 32, 2)}
PACKED = 8  # bytes of an entry above a bound before it is in order, for as many as there is room for
ORDERING = 44  # bytes of an entry while it is put in order
CELL = 16  # bytes of a piece of a row: where its entries are packed, and how many


def parameters(shape: Shape) -> int:
    """Count the entries of the parameters."""
    return shape.width * (2 * shape.d_model + BIASES.get(shape.variant, 1)) + shape.d_model


def state_bytes(shape: Shape, optimizer: str = "adam", weight: int = 4) -> float:
    """Compute the bytes that live between two steps: weights, moments, mean of the weights, counters; no gradient.

    `weight` is the bytes of one; here it is 4, and 2 says what bfloat16 would save.
    """
    per_entry = weight + MOMENTS[optimizer] + (4 if shape.ema else 0)
    return parameters(shape) * per_entry + 8 * shape.width


def block_of(shape: Shape) -> int:
    """Compute the latents of a block of z."""
    latents = TritonBackend().block_entries // shape.batch // 32 * 32
    return min(shape.width, max(32, latents))


def choice_bytes(entries: int, lines: int, count: int) -> int:
    """Compute what a choice of `count` from each of `lines` needs beside the entries themselves."""
    width = entries // lines
    group = min(GROUP, width & -width)
    if count >= width // group:  # every group may hold one: all entries are looked at
        return LOOKED_AT * entries
    chosen = lines * count
    return max(LARGEST * entries // group, NEAR * chosen * group) + 8 * chosen


def moments(shape: Shape, matmul: str = "float32", weight: int = 4) -> dict[str, int]:
    """Compute the bytes beside the state, by the moments of a step at which they may be most.

    The batch, the normalised batch and the encoder's input are in each of them.
    """
    matrix, batch, rows = weight * shape.width * shape.d_model, shape.batch, 4 * shape.batch * shape.d_model
    if shape.variant not in CHOOSING:
        return bound_moments(shape, matmul, matrix)
    block, n = block_of(shape), shape.k * batch
    z = 4 * batch * block
    lines, count = (batch, shape.k) if shape.variant == "topk" else (1, n)
    found = {
        "choice": 3 * rows + z + choice_bytes(batch * block, lines, count),
        "gradients": 2 * matrix + 3 * rows + 56 * n + BY_LATENT * shape.width,
    }
    if matmul == "bf16":  # both factors of the block's product once more, at two bytes
        found["product"] = 3 * rows + z + rows // 2 + 2 * block * shape.d_model
    if shape.variant == "matryoshka":
        found["prefixes"] = (5 * PREFIXES + 2) * rows + 24 * n
        found["gradients"] += (PREFIXES - 1) * rows
    return with_auxk(shape, found, matrix) if shape.dead else found


def comes_whole(shape: Shape) -> bool:
    """Return whether all of z is given back to a variant with a bound, as so much of it is above."""
    return shape.l0 > TritonBackend().dense_share * shape.width


def bound_moments(shape: Shape, matmul: str, matrix: int) -> dict[str, int]:
    """Compute the bytes beside the state of a variant with a bound; `matrix` is those of one of the weight matrices."""
    batch, rows = shape.batch, 4 * shape.batch * shape.d_model
    if comes_whole(shape):
        of_z, of_matrix = DENSE[shape.variant]
        z = 4 * batch * shape.width
        return {"loss": round(of_z * z) + of_matrix * matrix + 3 * rows, "gradients": 2 * matrix + 2 * z + 4 * rows}
    block, n = block_of(shape), shape.l0 * batch
    cells = batch * math.ceil(shape.width / PIECE_LATENTS)
    z, packed = 4 * batch * block, PACKED * int(TritonBackend().dense_share * batch * shape.width) + CELL * cells
    inputs = (2 if shape.variant == "relu" else 3) * rows  # ReLU's encoder reads the normalised batch itself
    of_entry, of_matrix = LOSS[shape.variant]
    entry, latent, matrices = GRADIENTS[shape.variant]
    found = {
        "choice": inputs + z + packed,
        "order": inputs + packed + ORDERING * n + CELL * cells,
        "loss": 3 * rows + of_entry * n + of_matrix * matrix,
        "gradients": 3 * rows + entry * n + latent * shape.width + matrices * matrix,
    }
    if matmul == "bf16":
        found["product"] = found["choice"] + rows // 2 + 2 * block * shape.d_model
    return found


def with_auxk(shape: Shape, found: dict[str, int], matrix: int) -> dict[str, int]:
    """Add AuxK's part to the moments of a step without it; d is filled up to a multiple of 64.

    `matrix` is the bytes of one of the two weight matrices.
    """
    batch, rows, k_aux = shape.batch, 4 * shape.batch * shape.d_model, auxk_size(shape.d_model)
    dead = min(shape.width, math.ceil(shape.dead / 64) * 64)
    z, entries = 4 * batch * dead, 24 * shape.k * batch
    few = dead <= TritonBackend().dense_dead * k_aux
    held = z if few else 24 * k_aux * batch
    # The rows of W_dec are picked. Where a reconstruction has several prefixes, their gradient is spread over a second
    # matrix and added to the first; else it is added where it belongs.
    second = matrix if shape.variant == "matryoshka" else 4 * dead * shape.d_model
    later = {name: found[name] + second + held for name in ("gradients", "prefixes") if name in found}
    if few:
        prefixes = PREFIXES if shape.variant == "matryoshka" else 1
        auxk = 15 * batch * dead + 4 * dead * shape.d_model + (2 * prefixes + 4) * rows + entries
        return found | later | {"AuxK": auxk}
    return found | later | {"AuxK's choice": z + choice_bytes(batch * dead, batch, k_aux) + 3 * rows + entries}


def peak_bytes(shape: Shape, optimizer: str = "adam", matmul: str = "float32", weight: int = 4) -> float:
    """Compute the most bytes that a training step holds."""
    return state_bytes(shape, optimizer, weight) + max(moments(shape, matmul, weight).values())


def row(shape: Shape) -> str:
    """Write one line of the table: by formula and counted, in GB, and the moment of the peak."""
    count = count_step(shape)
    found = moments(shape)
    most = max(found, key=lambda name: found[name])
    state, peak = state_bytes(shape), peak_bytes(shape)
    gradients = 4 * parameters(shape)
    off = peak / count.peak - 1
    cells = [
        f"{shape.variant}",
        f"{shape.width:,}",
        f"{shape.dead:,}",
        f"{state / 1e9:.3f}",
        f"{gradients / 1e9:.3f}",
        f"{(peak - state) / 1e9:.3f}",
        f"{peak / 1e9:.3f}",
        most,
        f"{count.peak / 1e9:.3f}",
        f"{off:+.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--widths", nargs="+", type=int, default=[12_288, 49_152, 262_144, 1_048_576])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dead", nargs="+", type=float, default=[0.0], help="shares of latents that may be dead")
    parser.add_argument("--l0", type=int, help="latents active on a token of relu, jumprelu and gated: three times k")
    parser.add_argument("--start", action="store_true", help="half of all latents instead, where relu and gated start")
    parser.add_argument("--ema", action="store_true")
    args = parser.parse_args()
    print(f"d={args.d_model}, B={args.batch:,}, k={args.k}; GB (1e9 bytes), with Adam's moments in float32\n")
    print("| variant | F | may be dead | state | gradients | peak - state | peak | at | counted | formula off by |")
    print("| :-- | --: | --: | --: | --: | --: | --: | :-- | --: | --: |")
    for variant in args.variants:
        for width in args.widths:
            for share in args.dead if variant in CHOOSING else [0.0]:
                dead = round(share * width)
                active = width // 2 if args.start else args.l0
                shape = Shape(variant, width, args.d_model, args.batch, args.k, active, dead=dead, ema=args.ema)
                print(row(shape), flush=True)


if __name__ == "__main__":
    main()
