"""`make wheels`: what it fetches is complete without torch, and installs on a machine without a network."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Two that need torch or a package without any wheel, and few others.
FEW = ["hydra-core>=1.3,<1.4", "lightning-utilities>=0.15", "torchmetrics>=1.8"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_unknown_extra_is_refused(tmp_path: Path) -> None:
    done = command(".ci/wheels.py", str(tmp_path), "--extras", "parquett")
    assert done.returncode == 1 and "pyproject.toml has no extra parquett" in done.stderr


@pytest.mark.slow
def test_a_folder_of_wheels_installs_without_an_index(tmp_path: Path) -> None:
    python = sysconfig.get_python_version()
    wheels = tmp_path / "wheels"
    done = command(".ci/wheels.py", str(wheels), "--python", python, "--only", *FEW)
    if "Could not find a version" in done.stderr or "Connection" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    names = {path.name.split("-")[0] for path in wheels.glob("*.whl")}
    assert {"hydra_core", "omegaconf", "antlr4_python3_runtime", "torchmetrics", "numpy"} <= names
    assert not {"torch", "triton"} & names
    assert command("-m", "venv", "--without-pip", str(tmp_path / "other")).returncode == 0
    (place,) = (tmp_path / "other" / "lib").glob("*/site-packages")
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(place)]
    assert command(*install, *files).returncode == 0
    tried = [tmp_path / "other/bin/python", "-c", "import hydra, omegaconf, lightning_utilities"]
    assert subprocess.run(tried, check=False).returncode == 0


@pytest.mark.slow
def test_what_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    done = command(".ci/wheels.py", str(tmp_path / "wheels"), "--only", "zarr>=3.1", "--glibc", "28", "--python", "2.7")
    assert done.returncode != 0 and "did not end well" in done.stderr
