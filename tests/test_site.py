"""The documentation's site builds without a warning, and its notebook runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.sae import save
from train.sae.variants.topk import TopK

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_site_builds_and_has_every_setting(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "build.py"), str(tmp_path / "docs")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "docs" / "site"
    settings = (site / "settings.html").read_text()
    for name in ("store.encoding", "sae.k", "packing.bos_token", "feature_metrics_with.units", "optimizer.lr", "to"):
        assert f"<code>{name}</code>" in settings, name
    assert "encode_text" in (site / "api.html").read_text()
    assert "inference form" in (site / "concepts.html").read_text()
    pages = [page.read_text() for page in site.rglob("*.html")]
    assert not [page for page in pages if "fonts.googleapis" in page or "unpkg.com" in page]


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    record = {
        "site": "resid_post.3",
        "model": {"name": "embedded", "revision": None, "dtype": "float32", "attn_implementation": None},
        "packing": {"context": 256, "bos": "document"},
        "training": {"heldout": {"nmse": 0.5}},
    }
    torch.manual_seed(0)
    save(TopK(192, 384, k=16), tmp_path / "sae", record)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (first,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    first.source += f"\nFOLDER = Path({str(tmp_path / 'sae')!r})"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    printed = [out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("16.0 latents fire on a token" in text for text in printed)
    shown = [out.data for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    assert any("image/png" in data for data in shown)
