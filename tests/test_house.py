"""The rules of the house: floors, rooms, no circles, one home a name, sizes, packaging."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "harvest", "train", "evaluate")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
CODE = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))]

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


def module_of(path: Path, root: Path = ROOT) -> str:
    """The dotted name by which a file is imported."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(paths: Mapping[str, Path]) -> dict[str, set[str]]:
    """Which of these modules each imports, at any depth of its file: in functions and under TYPE_CHECKING too."""
    edges: dict[str, set[str]] = {}
    for module, path in paths.items():
        # `from data.loading import order` names a module, `from data.loading.order import RUN` something in one.
        named = {name if name in paths else name.rpartition(".")[0] for name in imports(path)}
        edges[module] = (named & paths.keys()) - {module}
    return edges


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules in which each reaches each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for after in sorted(edges[node]):
            if after not in index:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], index[after])
        if low[node] == index[node]:
            group = []
            while not group or group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return sorted(found)


# Circles that are still there: this list may only shrink.
KNOWN_CIRCLES: list[list[str]] = []


def test_no_import_goes_in_a_circle() -> None:
    found = circles(graph({module_of(path): path for path in CODE}))
    assert [circle for circle in found if circle not in KNOWN_CIRCLES] == []


def test_the_circle_test_sees_one(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from b import g\n")
    (tmp_path / "b.py").write_text("if TYPE_CHECKING:\n    from c import h\n")
    (tmp_path / "c.py").write_text("import a\n")
    (tmp_path / "d.py").write_text("import a, b, c\n")
    paths = {module_of(path, tmp_path): path for path in tmp_path.glob("*.py")}
    assert circles(graph(paths)) == [["a", "b", "c"]]


ROOMS = ("base", "slurm", "storage", "store", "loading", "tools")


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_of_data_are_a_staircase(room: str) -> None:
    below = ROOMS[: ROOMS.index(room) + 1]
    for path in sorted((ROOT / "data" / room).rglob("*.py")):
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] != "data" or parts[1] in below, f"{path.relative_to(ROOT)} imports {name}"


def test_all_of_data_is_in_its_rooms() -> None:
    assert {path.name for path in (ROOT / "data").glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {path.parent.name for path in (ROOT / "data").glob("*/__init__.py")} == set(ROOMS)


def defined(path: Path) -> Iterator[str]:
    """The public names that a module defines at its top level; what it imports is another's."""
    for node in ast.parse(path.read_text()).body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


# `main` and `run` are what each entry point is called by. The others are what each format's module in train/interop
# answers to. This list may only shrink: a word for several things is the name of none.
ENTRIES = {"main", "run"}
DOUBLE_NAMES = {"HOLDS", "LOADING", "files", "read"}


def test_a_public_name_has_one_home() -> None:
    homes: dict[str, set[str]] = defaultdict(set)
    for path in SOURCES:
        for name in defined(path):
            homes[name].add(module_of(path))
    double = {name: sorted(modules) for name, modules in homes.items() if len(modules) > 1 and name not in ENTRIES}
    assert {name: modules for name, modules in double.items() if name not in DOUBLE_NAMES} == {}


# Modules that still take from another's run.py, which is an entry point and no library: this list may only shrink.
FROM_A_RUN = {
    "benchmarks.kill <- harvest.run",
    "benchmarks.rates <- train.run",
    "benchmarks.trainer <- train.run",
    "train.launcher <- train.run",
}


def test_nobody_takes_from_a_run() -> None:
    taking = set()
    for path in CODE:
        for name in imports(path):
            parts = name.split(".")
            # A package's door may show what its run.py does, and __main__.py is how it is called.
            if (
                "run" in parts[1:-1]
                and path.name not in ("__main__.py", "__init__.py")
                and module_of(path) != ".".join(parts[:-1])
            ):
                taking.add(f"{module_of(path)} <- {'.'.join(parts[:-1])}")
    assert taking - FROM_A_RUN == set()


def functions(path: Path) -> list[tuple[str, int]]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(f"{path.relative_to(ROOT)}:{n.name}", (n.end_lineno or n.lineno) - n.lineno + 1) for n in nodes]


def test_functions_and_files_stay_small() -> None:
    assert not [size for path in SOURCES for size in functions(path) if size[1] > 60]
    assert not [path for path in SOURCES if len(path.read_text().splitlines()) > 500]


# How a noun, a question or an aside begins. ruff's D401 knows "The" and "What" too, but not most of these.
NO_VERBS = set(
    [
        "the",
        "a",
        "an",
        "this",
        "that",
        "these",
        "those",
        "its",
        "our",
        "his",
        "which",
        "what",
        "who",
        "where",
        "when",
        "whether",
        "why",
        "how",
        "if",
        "while",
        "as",
        "of",
        "in",
        "on",
        "at",
        "to",
        "for",
        "from",
        "with",
        "without",
        "by",
        "up",
        "one",
        "two",
        "both",
        "each",
        "every",
        "all",
        "some",
        "no",
        "none",
        "rows",
        "tokens",
        "seconds",
        "bytes",
        "batches",
    ]
)


def first_words() -> Iterator[tuple[str, str]]:
    """Yield each function of ours and the word with which its docstring opens."""
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (doc := ast.get_docstring(node)):
                yield f"{path.relative_to(ROOT)}:{node.name}", doc.split()[0]


def test_docstrings_open_with_a_verb() -> None:
    opening = dict(first_words())
    assert len(opening) > 1000
    assert {name: word for name, word in opening.items() if word.lower() in NO_VERBS or not word[0].isupper()} == {}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def reached_for(tree: ast.Module) -> Iterator[str]:
    """Yield each private name of another module or object that a file takes, reads or patches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if private(alias.name))
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            named = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from (name for name in named if private(name.rpartition(".")[2]))


# Other libraries' own, where they have no public name for it.
PRIVATE = {
    *("config._attn_implementation", "_forward_hooks", "_forward_pre_hooks", "server._server", "launcher._target_"),
    "cpu._is_amx_tile_supported",
}
PATCHES = 126  # in all tests; may only shrink: give a parameter, a fake storage or a public step instead


def test_tests_use_public_names_and_few_patches() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("*.py"))}
    found = {f"{path.relative_to(ROOT)}: {name}" for path, tree in trees.items() for name in reached_for(tree)}
    assert {name for name in found if not name.endswith(tuple(PRIVATE))} == set()
    calls = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Call)]
    patches = [call for call in calls if ast.unparse(call.func).endswith(("patch.setattr", "patch.delattr"))]
    assert len(patches) <= PATCHES


def test_the_test_of_private_names_sees_them() -> None:
    code = "from a import _b\nc._d()\nmonkeypatch.setattr(e, '_f', g)\nmonkeypatch.setattr('h.i._j', k)\nself._l, m.n"
    assert list(reached_for(ast.parse(code))) != []
    assert {"_b", "c._d", "_f", "h.i._j"} == set(reached_for(ast.parse(code)))


def test_nothing_of_ours_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == []


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= targets
