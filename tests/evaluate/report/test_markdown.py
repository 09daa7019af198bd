"""The written report: JSON that any reader takes, tables that say what they hold, figures that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from evaluate.report.columns import DEFINITIONS
from evaluate.report.markdown import dumps, format_number, markdown, stems, table, write_markdown
from evaluate.report.png import l0_histograms, plot_against_l0
from evaluate.report.series import families
from tests.helpers.reports import VARIANTS, a_report, a_row


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [a_row(i, variant, 4.0 + i, 0.1 + i / 50) for i, variant in enumerate(VARIANTS, 1)]


def test_write_leaves_json_markdown_and_readable_figures(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = write_markdown(a_report(rows), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.md"
    read = json.loads((path.parent / "report.json").read_text())
    plots = read["sites"][0]["plots"]
    assert len(plots) == 4
    for plot in plots:
        assert f"]({plot})" in path.read_text()
        picture = imread(path.parent / plot)
        assert min(picture.shape[:2]) > 300 and picture.std() > 0.01  # something is drawn
    assert not list(path.parent.rglob("*.tmp"))
    assert read["sites"][0]["saes"] == rows


def test_the_markdown_states_sizes_and_defines_its_columns(rows: list[dict[str, Any]]) -> None:
    text = markdown(a_report(rows, plots=[]))
    for stated in ("1,000 held-out tokens", "960 predicted", "123,456", "0123456789abcdef", "width 16", "3 (in 1,000)"):
        assert stated in text, stated
    heads = {cell.strip() for line in text.splitlines() if line.startswith("| SAE") for cell in line.split("|")}
    own_words = {"", "asked", "latents F", "expansion", "training tokens", "seed", "folder"}
    defined = " ".join(f"{name}: {words}" for name, words in DEFINITIONS.items())
    missing = [head for head in heads - own_words if head.rstrip(" ↓↑") not in defined]
    assert not missing
    tables = [line for line in text.splitlines() if line.startswith("| 2 gated")]
    assert len(tables) == 3 and "0.1400 ± 0.0020" in tables[0]


def test_unknown_values_are_dashes_not_zeros(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows[0]["metrics"]["recovered_zero"] = {"value": None, "se": None}
    rows[0]["metrics"]["ce_increase"] = {"value": None, "se": None}
    rows[0]["training"] = {}
    rows[0]["storage_share"] = None
    line = next(
        line for line in write_markdown(a_report(rows), tmp_path).read_text().splitlines() if "| 1 batchtopk" in line
    )
    assert line.count("–") == 2


def test_numbers_keep_small_values_visible() -> None:
    assert format_number(0.12345, 4) == "0.1235" or format_number(0.12345, 4) == "0.1234"
    assert format_number(0.000012, 4) == "1.2e-05"
    assert format_number(0.0, 2) == "0.00"
    assert format_number(-0.5, 1) == "-0.5"
    assert format_number(None) == "–"


def test_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |"


def test_json_keeps_lists_of_numbers_on_one_line_and_changes_no_value() -> None:
    value = {"a": [1, 2.5, None, -3e-7], "b": [{"c": []}], "d": "[1,\n 2]", "e": ["x", 1]}
    text = dumps(value)
    assert json.loads(text) == value
    assert '"a": [1, 2.5, null, -3e-07]' in text.replace("[ 1", "[1").replace("07 ]", "07]")
    with pytest.raises(ValueError, match="JSON"):
        dumps({"a": float("nan")})


def test_figures_of_two_stores_do_not_overwrite_each_other(rows: list[dict[str, Any]]) -> None:
    one = a_report(rows)["sites"][0]
    assert stems([one]) == ["resid_post.3"]
    two = stems([one, one | {"fingerprint": "ff", "store": "lm-ff"}, one | {"site": "model.layers.2/x"}])
    assert len(set(two)) == 3 and not any("/" in stem for stem in two)


def test_lines_are_one_a_variant_and_width_in_order_of_l0() -> None:
    rows = [
        a_row(1, "topk", 9, 0.1),
        a_row(2, "topk", 3, 0.2),
        a_row(3, "topk", 5, 0.1, width=128),
        a_row(4, "relu", 4, 0.1),
    ]
    got = [(label, [row["number"] for row in own]) for label, _, own in families(rows)]
    assert got == [("relu, F=64", [4]), ("topk, F=64", [2, 1]), ("topk, F=128", [3])]
    axes = plot_against_l0(rows, "nmse", "NMSE", "").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Pareto front", *(label for label, _ in got)]
    assert axes.get_xlabel() and axes.get_ylabel() == "NMSE"


def test_error_bars_are_the_standard_errors() -> None:
    axes = plot_against_l0([a_row(1, "topk", 9, 0.1)], "nmse", "NMSE", "").axes[0]
    vertical = axes.containers[0].lines[2][1].get_segments()[0]
    np.testing.assert_allclose(vertical[:, 1], [0.098, 0.102])


def test_a_sweep_of_many_saes_names_only_the_ends_of_its_legend() -> None:
    rows = [a_row(i, "topk", 2.0 + i, 0.3 - i / 100) for i in range(20)]
    legend = l0_histograms(rows, "many").axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["L0 2.0", "L0 21.0"]
