"""Every Triton kernel becomes machine code for an A100 and an H100, without a GPU, and spills no register.

The numbers of the kernels are proved elsewhere, in Triton's interpreter; here the compiler, and NVIDIA's assembler
which the triton package brings along, say whether they build and whether a program fits into the registers it has.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]
pytestmark = [
    pytest.mark.slow,  # dozens of runs of a compiler; what the kernels compute is in the fast tests
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
    ),
]


def sources() -> str:
    return "".join(path.read_text() for path in (ROOT / "train/sae/sparse/kernels").glob("*.py"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    own = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | own
    command = [sys.executable, "-m", "tests.helpers.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_kernels_build_for_both_cards_at_every_width_and_spill_nothing(compiled: dict[str, Any]) -> None:
    kernels = compiled["kernels"]
    built = {kernel["name"] for kernel in kernels}
    assert built == set(re.findall(r"^def (\w+_kernel)\(", sources(), re.MULTILINE))
    assert {(kernel["arch"], kernel["width"]) for kernel in kernels} == {
        (arch, width) for arch in (80, 90) for width in (768, 2304, 4096, 12_288)
    }
    assert [kernel for kernel in kernels if kernel["spilled"]] == []


def test_the_assembler_is_asked_in_earnest(compiled: dict[str, Any]) -> None:
    """Too few warps for a wide row do spill: a test that could not see it would prove nothing."""
    assert compiled["too_few_warps"]["spilled"] > 0
