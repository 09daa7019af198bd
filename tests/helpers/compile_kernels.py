"""Compile every Triton kernel for a GPU that is not here, and print what NVIDIA's assembler says of each, as JSON.

    python -m tests.helpers.compile_kernels

A process of its own: one in which Triton interprets its kernels cannot compile them, and the reverse.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from train.sae.sparse.above import PIECE_LATENTS
from train.sae.sparse.candidates import LATENTS, TOKENS
from train.sae.sparse.groups import PIECE_ENTRIES
from train.sae.sparse.kernels import above, adam, candidates, dots, error, norms, project, sums
from train.sae.sparse.kernels.launch import ENTRIES, columns_of_rows, tile_of_rows, warps_for_row, warps_of_tile

WIDTHS = (768, 2304, 4096, 12_288)
ARCHITECTURES = (80, 90)  # A100, H100
INTEGERS = {"index_n", "order_n", "ends", "rows_n", "latents_n", "row_ends", "piece_ends", "groups_P"}
INTEGERS |= {"found", "starts_BP", "counts_BP", "starts_B", "limits_B"}
SCALARS = {"n": "i64", "groups": "i64", "D": "i32", "base_stride": "i32", "latents_s": "*i32", "bound_stride": "i32"}
SCALARS |= dict.fromkeys(("room", "first", "width", "pieces", "first_piece", "all_pieces"), "i64")
SCALARS |= dict.fromkeys(("latents_S", "ends_RTB", "out_latents_n"), "*i32")
SCALARS |= dict.fromkeys(("B", "F", "T", "slots"), "i32")
SETTINGS = ("rate", "gain_1", "gain_2", "eps", "decay", "clip")


def type_of(argument: str, constants: dict[str, Any]) -> str:
    """Triton's name for the type of a kernel's argument."""
    if argument in constants:
        return "constexpr"
    if argument in SETTINGS:
        return "*fp32" if argument == "rate" and constants["RATE_HERE"] else "fp32"
    return SCALARS.get(argument, "*i64" if argument in INTEGERS else "*fp32")


def compiled(function: Any, constants: dict[str, Any], warps: int, arch: int, folder: Path) -> dict[str, Any]:
    """Registers of a thread, and bytes that it stores beside them, of a kernel for sm_`arch`."""
    signature = {argument: type_of(argument, constants) for argument in function.arg_names}
    source: Any = ASTSource(function, signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    ptx, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    ptx.write_text(made.asm["ptx"])
    target = re.search(r"\.target (sm_\w+)", made.asm["ptx"])
    assert target is not None, made.asm["ptx"][:500]
    command = [get_ptxas(arch).path, "-v", f"-arch={target[1]}", ptx, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stderr
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None and spilled is not None, said
    return {"name": function.__name__, "arch": arch, "registers": int(registers[1]), "spilled": int(spilled[1])}


def launches(width: int) -> Iterator[tuple[Any, dict[str, Any], int]]:
    """Every kernel with the sizes and warps that its launch chooses for rows of `width`."""
    whole, piece = int(triton.next_power_of_2(width)), columns_of_rows(width)
    yield dots.entry_dots_kernel, {"TILE": ENTRIES, "COLUMNS": piece}, 4
    yield project.project_rows_kernel, {"COLUMNS": whole}, warps_for_row(whole)
    summed = {"TILE": ENTRIES, "COLUMNS": piece}
    yield sums.piece_sums_kernel, {"ORDERED": True, "PIECE": PIECE_ENTRIES, **summed}, 4
    for ordered, cut in ((False, False), (True, True)):
        yield sums.group_sums_kernel, {"ORDERED": ordered, "CUT": cut, **summed}, 4
    tile, rows = tile_of_rows(whole), {"TILE": tile_of_rows(whole), "COLUMNS": whole}
    for cut, unit in ((True, False), (True, True)):
        yield sums.gradient_rows_kernel, {"CUT": cut, "UNIT": unit, **rows}, warps_of_tile(tile * whole)
    for tile in (16, 64, 128):
        for prefixes, zeros in ((1, False), (1, True), (5, False)):
            sizes = {"PREFIXES": prefixes, "ZEROS": zeros, "TILE": tile, "MORE": error.MORE}
            yield error.decode_error_kernel, sizes | {"COLUMNS": error.TILE_ENTRIES // tile}, error.WARPS
    yield above.pack_above_kernel, {"PIECE": PIECE_LATENTS}, 4
    tiles = {"TOKENS": TOKENS, "LATENTS": LATENTS, "DEPTH": candidates.DEPTH}
    for rounded, precision in ((False, "ieee"), (False, "tf32"), (True, "ieee")):
        forms = {"BIAS": True, "ROUND": rounded, "PRECISION": precision, **tiles}
        yield candidates.product_above_kernel, forms, candidates.PRODUCT_WARPS
    yield candidates.order_entries_kernel, {"TOKENS": TOKENS, "TILES": candidates.TILES}, 4
    columns = adam.columns_of(width)
    for unit in (False, True):
        yield norms.row_norms_kernel, {"UNIT": unit, "COLUMNS": whole}, warps_for_row(whole)
        for here in (False, True):
            forms = {"UNIT": unit, "CLIP": True, "DECOUPLED": False, "RATE_HERE": here}
            forms |= {"WHOLE": columns >= width, "COLUMNS": columns}
            yield adam.adam_rows_kernel, forms, adam.warps_of(columns)


def every(folder: Path) -> dict[str, Any]:
    """What is compiled with the launches' own sizes, and one launch with too few warps, which must spill."""
    found = [
        {"width": width, **compiled(function, constants, warps, arch, folder)}
        for width in WIDTHS
        for function, constants, warps in launches(width)
        for arch in ARCHITECTURES
    ]
    too_few = compiled(project.project_rows_kernel, {"COLUMNS": 16_384}, 4, 90, folder)
    return {"kernels": found, "too_few_warps": too_few}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(every(Path(folder))))
