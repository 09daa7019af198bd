"""Compile every Triton kernel for a GPU that is not here, and print what NVIDIA's assembler says of each, as JSON.

    python -m tests.helpers.compile_kernels

A process of its own: one in which Triton interprets its kernels cannot compile them, and the reverse.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from train.sae.sparse import kernels

WIDTHS = (768, 2304, 4096, 12_288)
ARCHITECTURES = (80, 90)  # A100, H100
FLOAT, INDEX = "*fp32", "*i64"
POINTERS = {"weight_n": FLOAT, "index_n": INDEX, "ends": INDEX, "table_XD": FLOAT, "out_GD": FLOAT, "rows_n": INDEX}
POINTERS |= {
    "latents_n": INDEX,
    "left_BD": FLOAT,
    "right_FD": FLOAT,
    "out_n": FLOAT,
    "grad_FD": FLOAT,
    "rows_FD": FLOAT,
}
TYPES = POINTERS | {"n": "i64", "D": "i32"}


def compiled(name: str, constants: dict[str, int], warps: int, arch: int, folder: Path) -> dict[str, Any]:
    """Registers of a thread, and bytes that it stores beside them, of a kernel for sm_`arch`."""
    function = getattr(kernels, name)
    signature = {argument: TYPES.get(argument, "constexpr") for argument in function.arg_names}
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
    return {"name": name, "arch": arch, "registers": int(registers[1]), "spilled": int(spilled[1])}


def every(folder: Path) -> dict[str, Any]:
    """What is compiled with the launches' own sizes, and one launch with too few warps, which must spill."""
    names = [name for name, value in vars(kernels).items() if isinstance(value, triton.runtime.JITFunction)]
    found = []
    for name in names:
        for width in WIDTHS:
            columns = int(triton.next_power_of_2(width))
            whole_row = "TILE" not in getattr(kernels, name).arg_names
            constants = (
                {"COLUMNS": columns} if whole_row else {"TILE": kernels._TILE, "COLUMNS": kernels._columns(width)}
            )
            warps = kernels.warps_for_row(columns) if whole_row else 4
            found += [{"width": width, **compiled(name, constants, warps, arch, folder)} for arch in ARCHITECTURES]
    too_few = compiled("_project_rows", {"COLUMNS": 16_384}, 4, 90, folder)
    return {"kernels": found, "too_few_warps": too_few}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(every(Path(folder))))
