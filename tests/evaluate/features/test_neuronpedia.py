"""Feature pages as SAEDashboard's files: figures worked by hand, all of the pages in them, loaded by SAEDashboard."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.agreement import ROOT
from data.base.errors import UserError
from evaluate.config import NeuronpediaSettings
from evaluate.features.neuronpedia import Interval, intervals, write_files
from evaluate.features.page_data import PageData
from tests.helpers.pages import HOSTILE, a_page
from tests.helpers.settings import stage_config

PEERS = ROOT / ".venv-peers/bin/python"


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Pages of nine latents at layer 3, of which the first is silent."""
    a_page(tmp_path / "pages", 9, site="resid_post.3")
    return tmp_path / "pages"


def written(pages: Path, **settings: Any) -> dict[str, Any]:
    out = write_files(NeuronpediaSettings(pages=str(pages), out=str(pages.parent / "out"), **settings))
    return {path.name: json.loads(path.read_text()) for path in out.iterdir()}


def test_conf_has_every_setting_with_the_default_of_the_schema() -> None:
    given = stage_config("neuronpedia")
    assert set(given) == set(NeuronpediaSettings.model_fields)
    assert NeuronpediaSettings.of(given) == NeuronpediaSettings()


def test_the_intervals_by_hand() -> None:
    """Of 100 tokens 20 fire: in bins of width 0.5, 10, 5, 0, 2, 1, 2. Five parts of six bins: the last has two."""
    assert intervals([10, 5, 0, 2, 1, 2], 0.5, 100) == [
        Interval(0.0, 0.5, 0.90),
        Interval(0.5, 1.0, 0.05),
        Interval(1.0, 1.5, 0.0),
        Interval(1.5, 2.0, 0.02),
        Interval(2.0, 3.0, 0.03),
    ]
    assert intervals([4], 2.0, 8) == [Interval(0.0, 2.0, 1.0)]


def test_every_latent_that_fires_is_there_with_what_its_page_has(pages: Path) -> None:
    data, files = PageData(pages), written(pages, model_id="tiny", source_set="res-mine", dataset="me/text")
    assert set(files) == {"batch-0.json", "skipped_indexes.json"}
    batch = files["batch-0.json"]
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 3, "res-mine")
    assert files["skipped_indexes.json"]["skipped_indexes"] == [0]
    assert [feature["feature_index"] for feature in batch["features"]] == list(range(1, 9))
    for feature in batch["features"]:
        latent = feature["feature_index"]
        top, drawn = data.examples(latent)
        fired = data.index["fired"][latent]
        assert (
            feature["frac_nonzero"] == pytest.approx(fired / 42) and sum(feature["freq_hist_data_bar_heights"]) == fired
        )
        assert len(feature["pos_str"]) == len(feature["pos_values"]) == 3 and feature["dataset"] == "me/text"
        assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (6, 8)
        rows = feature["activations"]
        assert len(rows) == len(top) + len(drawn) and [row["tokens"] for row in rows[: len(top)]] == [
            c.tokens for c in top
        ]
        for row in rows:
            value = row["values"][row["qualifying_token_index"]]
            assert value > 0 and len(row["tokens"]) == len(row["values"])
            assert row["bin_min"] <= value <= row["bin_max"] * 1.005  # the pages round to three digits
        assert [row["bin_contains"] == -1 for row in rows] == [place < len(top) for place in range(len(rows))]


def test_a_name_is_made_of_variant_site_and_width(pages: Path) -> None:
    batch = written(pages)["batch-0.json"]
    assert batch["model_id"] == HOSTILE[2] and batch["sae_set"].endswith("-resid-post-9")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"pages": None}, "pages or out is not set"),
        ({"pages": "nowhere"}, "holds no feature pages"),
        ({"out": "."}, "is there already"),
    ],
)
def test_what_a_user_can_get_wrong(pages: Path, wrong: dict[str, Any], sentence: str) -> None:
    given = {"pages": str(pages), "out": str(pages.parent / "out"), **wrong}
    with pytest.raises(UserError, match=sentence):
        write_files(NeuronpediaSettings(**given))


def test_a_site_of_no_layer_is_refused(tmp_path: Path) -> None:
    a_page(tmp_path, 3)
    with pytest.raises(UserError, match="is in no layer: Neuronpedia sorts SAEs by layer"):
        write_files(NeuronpediaSettings(pages=str(tmp_path), out=str(tmp_path / "out")))


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers: `make peers` makes it")
def test_saedashboard_loads_it_and_would_write_the_same(pages: Path) -> None:
    """Its own classes take every key, and give back what they were given."""
    written(pages)
    code = (
        "import json, sys; from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch\n"
        "given = json.load(open(sys.argv[1]))\n"
        "assert NeuronpediaDashboardBatch(**given).to_dict() == given\n"
        "print(len(given['features']))\n"
    )
    done = subprocess.run(
        [str(PEERS), "-c", code, str(pages.parent / "out" / "batch-0.json")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, "8"), done.stderr
