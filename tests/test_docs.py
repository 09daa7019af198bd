"""What the documents say exists does, and they stay as short as they are meant to be."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERATED = ("settings.md", "api.md")  # pages of the site that docs/reference.py writes
MOST_LINES = {"README.md": 140, "CONTRIBUTING.md": 90}
NOT_OURS = {".venv", ".venv-peers", ".venv-saebench", "outputs"}
DOCUMENTS = sorted(path for path in ROOT.rglob("*.md") if not NOT_OURS & set(path.parts))


@pytest.mark.parametrize(("name", "most"), MOST_LINES.items())
def test_what_a_newcomer_reads_is_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= most


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", path.read_text())
    here = [link for link in links if "://" not in link and not (path.parent.name == "docs" and link in GENERATED)]
    assert not [link for link in here if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_into_a_page_meet_a_heading(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text())
    pages = {(link, anchor): (path.parent / link if link else path) for link, anchor in links if "://" not in link}
    assert not [found for found, page in pages.items() if page.exists() and found[1] not in anchors(page)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_merge_was_left_half_done(path: Path) -> None:
    assert not re.findall(r"^(?:<{7}|>{7}|={7})(?: |$)", path.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_that_are_run_exist(path: Path) -> None:
    modules = re.findall(r"python -m ([a-z_][a-z_.0-9]*[a-z0-9])", path.read_text())
    assert not [name for name in modules if find_spec(name) is None]


def test_the_readme_answers_where_things_are_done() -> None:
    """Of each question a reader may have, the file that the tree names for it does it."""
    readme = (ROOT / "README.md").read_text()
    answers = {
        "sets its threshold": ("batchtopk", "train/sae/variants/batchtopk.py", "threshold"),
        "checking each chunk": ("checksums.py", "data/loading/checksums.py", "crc32c"),
        "add an architecture here": ("families.py", "harvest/families.py", "gpt_neox"),
    }
    for question, (name, path, word) in answers.items():
        (line,) = [line for line in readme.splitlines() if question in line]
        assert name in line
        assert word in (ROOT / path).read_text()
