"""Settings given in Python are those of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.base.calls import overrides_of, settings_of_call
from data.base.errors import UserError
from tests.helpers.composing import composed

ROOT = Path(__file__).resolve().parents[3]
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12)
VALUES = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(VALUES | TEXTS, max_size=3) | VALUES | TEXTS)
def test_a_value_is_read_back_as_it_was_given(value: Any) -> None:
    (written,) = overrides_of({"name": value})
    read = OverridesParser.create().parse_override(written).value()
    assert [str(part) for part in read] == [str(part) for part in value] if isinstance(value, list) else True
    assert str(read) == str(value) if isinstance(value, str) else True
    assert read == value or isinstance(value, list | str)


def test_nested_dotted_and_group_names_are_overrides() -> None:
    given = {"sae": "topk", "loader": {"threads": 1}, "sae.k": 16, "experiment": "gao", "device_map": {"a.b": 1}}
    assert overrides_of(given) == ["sae=topk", "loader.threads=1", "sae.k=16", "+experiment=gao", "device_map={a.b:1}"]


def test_a_call_composes_what_the_command_line_does() -> None:
    called = settings_of_call("train", None, {"sae": "gated", "packing.context": 64, "tokens": 5000, "out": "here"})
    assert called == composed("train", ("sae=gated", "packing.context=64", "tokens=5000", "out=here"), {})
    assert not HydraConfig.initialized()


def test_a_whole_configuration_stays_as_it_is() -> None:
    config = OmegaConf.create({"a": 1, "b": "${a}"})
    assert settings_of_call("train", config, {}) == {"a": 1, "b": 1}
    assert settings_of_call("train", {"a": 1}, {}) == {"a": 1}
    with pytest.raises(UserError, match=r"^tokens came beside a whole configuration: put them into it"):
        settings_of_call("train", {"a": 1}, {"tokens": 3})


def test_a_preset_gives_a_stage_its_own_part() -> None:
    settings = settings_of_call("harvest", None, {"experiment": "gao", "lm_batch": 2})
    assert (settings["sites"], settings["lm_batch"]) == (["resid_post.8"], 2)
    assert "sae" not in settings or settings["sae"] is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"sae.kk": 3}, "sae.kk is no setting: did you mean sae.k?"),
        ({"sae": "tpk"}, "sae=tpk is unknown: choose one of batchtopk, "),
        ({"tokens": {1, 2}}, "tokens is given a set: give a number, a text, "),
        ({"hydra.launcher._target_": "os.system"}, "hydra.launcher._target_=os.system could call any code"),
    ],
)
def test_a_mistake_is_the_command_line_s_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        settings_of_call("train", None, given)
    assert str(caught.value).startswith(sentence)


def test_the_packages_are_used_from_another_folder_and_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, data, harvest, train, evaluate\n"
        "assert not {'torch', 'transformers', 'hydra', 'pydantic'} & sys.modules.keys()\n"
        "assert set(evaluate.__all__) <= set(dir(evaluate)) and callable(harvest.harvest) and callable(train.train)\n"
        "try: train.train(site='resid_pots.3', tokens=100)\n"
        "except data.UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "resid_pots.3" in done.stdout or "no store" in done.stdout
