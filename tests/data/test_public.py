"""What `data` offers by name, and that naming it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import data
from tests.helpers.damage import harvested

ROOT = Path(__file__).resolve().parents[2]


def test_a_store_is_opened_and_loaded_by_public_names(tmp_path: Path) -> None:
    made = harvested(tmp_path)
    store = data.open_store(made.path.name, str(tmp_path))
    assert isinstance(store, data.Store) and str(data.Site.parse("blocks.1.hook_resid_post")) == "resid_post.1"
    (rows,) = data.ActivationLoader(data.open_reader(store, "train", "resid_post.1"), batch=41)
    assert rows.shape == (41, 3)
    with pytest.raises(data.UserError):
        data.open_store("another", tmp_path)
    assert set(data.__all__) <= set(dir(data))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = data.nothing


def test_names_need_no_torch() -> None:
    code = (
        "import os, sys; os.environ.pop('OMP_WAIT_POLICY', None)\n"
        "from data import Site, Store, UserError, open_store\n"
        "assert 'torch' not in sys.modules and os.environ['OMP_WAIT_POLICY'] == 'passive'\n"
        "from data import ActivationLoader\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
