"""Build the documentation's site: `make docs` or `python docs/build.py [folder]`, any warning an error.

Its pages are this folder's Markdown, the stages' READMEs as they are, and two that are generated: the settings from
conf/ and their schemas, the API from docstrings. All are laid out as in the repository, this folder's at the top, so
that links lead where they lead there; a link to what is no page becomes plain text.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
INCLUDED = (
    "CONTRIBUTING.md",
    "benchmarks/RESULTS.md",
    "benchmarks/gpu/README.md",
    "data/README.md",
    "evaluate/README.md",
    "harvest/FAMILIES.md",
    "harvest/README.md",
    "harvest/embedded/README.md",
    "train/README.md",
    "train/sae/README.md",
)
PICTURES = ("benchmarks/figures/demo-nmse.png",)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def pages() -> dict[str, Path]:
    """Return the Markdown of the site by its place there."""
    own = {path.name: path for path in sorted(DOCS.glob("*.md"))}
    return own | {name: ROOT / name for name in INCLUDED}


def with_links(text: str, source: Path, places: dict[Path, str], at: str) -> str:
    """Lead the links of a page at `at` to places of the site; what is none of them stays as text."""

    def lead(match: re.Match[str]) -> str:
        mark, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target:
            return match[0]
        place = places.get((source.parent / target).resolve())
        if place is None:
            return label
        up = "../" * at.count("/")
        return f"{mark}[{label}]({up}{place}{anchor})"

    return _LINK.sub(lead, text)


def write_sources(out: Path) -> None:
    """Write the site's Markdown into `out`."""
    sys.path.insert(0, str(ROOT))  # this folder is there already
    from reference import api_page, settings_page

    generated = {"settings.md": settings_page(), "api.md": api_page()}
    sources = pages()
    places = {path.resolve(): name for name, path in sources.items()}
    places |= {(DOCS / name).resolve(): name for name in generated}
    places |= {(ROOT / name).resolve(): name for name in PICTURES}
    texts = {name: with_links(path.read_text(), path, places, name) for name, path in sources.items()}
    for name, text in (texts | generated).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    for name in PICTURES:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, out / name)
    shutil.copyfile(DOCS / "quickstart.ipynb", out / "quickstart.ipynb")


def build(out: Path) -> int:
    """Build the site into `out`/site; mkdocs' exit code."""
    shutil.rmtree(out, ignore_errors=True)
    write_sources(out / "pages")
    config = (DOCS / "mkdocs.yml").read_text()
    (out / "mkdocs.yml").write_text(config)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(out / "mkdocs.yml")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's advertisement of its successor
    return subprocess.run(command, env=quiet).returncode


def main(arguments: Sequence[str]) -> int:
    """Build the site into the folder that is named, outputs/docs without one."""
    out = Path(arguments[0]) if arguments else ROOT / "outputs" / "docs"
    code = build(out)
    if not code:
        print(f"documentation: {out / 'site' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
