"""python -m pytest tests/harvest/test_config.py: conf/harvest.yaml and the schema say the same, and refuse the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data.base.config import Settings
from data.base.errors import UserError
from data.base.sites import Site
from harvest.config import HarvestSettings, StoreSettings
from harvest.documents import SOURCES
from harvest.lm import ModelSettings
from harvest.packing import Packing
from harvest.run import harvest
from tests.helpers.corpus import ROOT, config, save_model, write_stories


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("texts") / "stories.jsonl", range(40))


def yaml(name: str) -> dict[str, Any]:
    """The keys of a file in conf/, without what Hydra alone reads."""
    found = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{name}.yaml"), resolve=False)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items() if key not in ("defaults", "hydra")}


GROUPS: dict[str, type[Settings]] = {
    "packing/default": Packing,
    "model/embedded": ModelSettings,
    **{f"text/{name}": source for name, source in SOURCES.items()},
}


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_every_key_of_a_group_has_a_field_with_the_same_default(name: str) -> None:
    keys, fields = yaml(name), GROUPS[name].model_fields
    assert keys.keys() == fields.keys()
    defaults = GROUPS[name].of({"name": "embedded"} if name.startswith("model") else {}).model_dump()
    assert keys == defaults
    assert all(field.description for field in fields.values() if field is not fields.get("kind"))


def test_every_key_of_the_stage_has_a_field_with_the_same_default() -> None:
    keys, fields = yaml("harvest"), HarvestSettings.model_fields
    assert keys.keys() | {"model", "text", "packing"} == fields.keys()
    assert keys.pop("store") == StoreSettings().model_dump()
    assert [Site.parse(name) for name in keys.pop("sites")] == list(fields["sites"].default)
    assert keys == {name: fields[name].default for name in keys}
    assert all(field.description for field in [*fields.values(), *StoreSettings.model_fields.values()])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("+foo=1", "foo is no setting: leave it out"),
        ("+token=5", r"token is no setting: did you mean tokens\?"),
        ("+store.chunk_row=5", r"store\.chunk_row is no setting: did you mean store\.chunk_rows\?"),
        ("+model.dtyp=float32", r"model\.dtyp is no setting: did you mean model\.dtype\?"),
        ("+model._target_=os.system", r"model\._target_ is no setting"),
        ("+text._target_=os.system", r"text\._target_ is no setting"),
        ("text.kind=os.system", r"text\.kind=os\.system is unknown: choose one of stdlib, files, dataset"),
        ("+text.path=a", r"text\.path is no setting: did you mean text\.paths\?"),
        ("text.paths=['']", r"text\.paths has an empty entry"),
        ("text.paths=[7]", r"text\.paths.*=7 is not allowed"),
        ("+packing._target_=x", r"packing\._target_ is no setting"),
        ("allow_mixed_devices=no", r"allow_mixed_devices=no is not allowed: it should be a valid boolean"),
        ("allow_mixed_devices=1", r"allow_mixed_devices=1 is not allowed"),
        ("packing.separator=null", r"packing\.separator=null is not allowed"),
        ("store.shards=yes", r"store\.shards=yes is not allowed"),
        ("tokens=nan", r"tokens=nan is not allowed"),
        ("tokens=inf", r"tokens=inf is not allowed"),
        ("tokens=true", r"tokens=true is not allowed"),
        ("tokens=1e300", "tokens=.* is not allowed: it should be less than or equal to"),
        ("packing.heldout=nan", r"packing\.heldout=nan must be a fraction"),
        ("packing.context=1e3", r"packing\.context=1000 is longer than the model reads"),
        ("cache=null", "cache=null is not allowed"),
        ("cache=", "cache is empty: name the folder"),
        ("lm_batch=0", "lm_batch=0 is not allowed"),
        ("model.revision=main", r"model\.revision holds for models of the hub only"),
        ("model.attn_implementation=[1]", r"model\.attn_implementation"),
    ],
)
def test_a_setting_that_is_wrong_is_one_sentence(
    model: Path, text: Path, tmp_path: Path, override: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        harvest(config(model, text, tmp_path / "cache", override))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()
