"""The rules of the house: floors, sizes, packaging."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "harvest", "train", "evaluate")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# An import may only point down.
ALLOWED = {
    "data": ("data",),
    "harvest": ("harvest", "data"),
    "train": ("train", "data"),
    "train.sae": ("train.sae", "data"),
    "evaluate": ("evaluate", "harvest", "train.sae", "data"),
}


def imports(path: Path) -> set[str]:
    """Every absolute module name a file imports, at any depth of the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor they come from"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def below(name: str, floors: tuple[str, ...]) -> bool:
    return any(name == floor or name.startswith(floor + ".") for floor in floors)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    home = ".".join(path.relative_to(ROOT).parts[:-1])
    floor = "train.sae" if below(home, ("train.sae",)) else home.split(".")[0]
    ours = {name for name in imports(path) if name.split(".")[0] in PACKAGES}
    climbing = {name for name in ours if not below(name, ALLOWED[floor])}
    assert not climbing, f"{path.relative_to(ROOT)} imports {sorted(climbing)}"


def test_the_floor_test_sees_a_climb(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from train import lit\n")
    assert not all(below(name, ALLOWED["data"]) for name in imports(bad))


def test_config_holds_only_yaml() -> None:
    strange = [p for p in (ROOT / "conf").rglob("*") if p.is_file() and p.suffix != ".yaml"]
    assert not strange


def functions(path: Path) -> list[tuple[str, int]]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return [(f"{path.relative_to(ROOT)}:{n.name}", (n.end_lineno or n.lineno) - n.lineno + 1) for n in nodes]


def test_functions_and_files_stay_small() -> None:
    sizes = [size for path in SOURCES for size in functions(path)]
    assert not [s for s in sizes if s[1] > 60]
    short = sum(1 for _, lines in sizes if lines <= 35)
    assert short >= 0.9 * len(sizes)
    assert not [p for p in SOURCES if len(p.read_text().splitlines()) > 500]


def test_nothing_of_ours_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == []


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets
