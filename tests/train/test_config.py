"""conf/*.yaml and the schemas say the same: every key has a field, with the same default; every field has a scope."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from data.base.cli import CONF
from data.base.config import Settings
from data.base.errors import UserError
from train.config import (
    SCOPES,
    VARIANT_ALIASES,
    LoggerSettings,
    OptimizerSettings,
    TrainerSettings,
    TrainSettings,
    of_scope,
    scope_of_override,
)
from train.interop.config import ExportSettings, ImportSettings
from train.publish import PublishSettings
from train.sae import VARIANTS

# Groups of conf/train.yaml's defaults list, in files of their own, and what Hydra reads itself.
ELSEWHERE = {"defaults", "hydra"}


def yaml_of(name: str) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items() if key not in ELSEWHERE}


SCHEMAS = {
    "train": TrainSettings,
    "trainer/auto": TrainerSettings,
    "logger/csv": LoggerSettings,
    "logger/wandb": LoggerSettings,
    "export": ExportSettings,
    "adopt": ImportSettings,
    "publish": PublishSettings,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_of_the_yaml_is_a_field_with_the_same_default(name: str) -> None:
    schema, written = SCHEMAS[name], yaml_of(name)
    assert written.keys() <= schema.model_fields.keys()
    defaults = schema.of({"out": "x"} if name == "train" else {}).model_dump()
    for key, value in written.items():
        if (name, key) not in (("train", "out"), ("logger/wandb", "name")):
            assert defaults[key] == value, key


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), OptimizerSettings])
def test_every_field_says_what_it_means(schema: type[Settings]) -> None:
    assert all(field.description for field in schema.model_fields.values())


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml")))
def test_every_optimizer_and_its_schedule_is_in_the_schema(name: str) -> None:
    written = yaml_of(f"optimizer/{name}")
    OptimizerSettings.of(written.pop("optimizer"))
    assert written.keys() <= TrainSettings.model_fields.keys()


def test_every_setting_has_a_scope_and_every_scope_its_settings() -> None:
    roots = {name.split(".")[0] for name in SCOPES}
    assert roots == TrainSettings.model_fields.keys()
    settings = TrainSettings.of({"out": "x"})
    names = ("sae", "stream", "store", "pass", "view")
    parts = [of_scope(settings, name) for name in names]
    assert all(parts)
    assert of_scope(settings, *names) == settings.model_dump(mode="json")


@pytest.mark.parametrize(
    ("override", "scope"),
    [
        ("sae.k=3", "sae"),
        ("sae=topk", "sae"),
        ("+sae.new=1", "sae"),
        ("optimizer.lr=1", "sae"),
        ("loader.threads=3", "pass"),
        ("loader.pool_chunks=3", "stream"),
        ("trainer.devices=2", "pass"),
        ("packing.context=64", "store"),
        ("log_every=1", "view"),
        ("nothing=1", None),
    ],
)
def test_the_scope_of_an_override(override: str, scope: str | None) -> None:
    found = scope_of_override(override)
    assert (found and found.name) == scope


def test_every_variant_has_the_names_of_earlier_versions() -> None:
    assert set(VARIANT_ALIASES.values()) == VARIANTS.keys()
    assert VARIANT_ALIASES["train.sae.topk.TopK"] == VARIANT_ALIASES["train.sae.variants.topk.TopK"] == "topk"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr": 1e-3}, "lr is no setting: did you mean optimizer.lr?"),
        ({"batchh": 3}, "batchh is no setting: did you mean batch?"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr is no setting: did you mean optimizer.lr?"),
        ({"batch": True}, "batch=true is not allowed: it should be a whole number"),
        ({"clip": float("nan")}, "clip=nan is not allowed: it should be a finite number"),
        ({"clip": float("inf")}, "clip=inf is not allowed: it should be a finite number"),
        ({"trainer": {"deterministic": "no"}}, "trainer.deterministic=no is not allowed: it should be a valid boolean"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas.1=1.0 is not allowed: it should be less than 1"),
        ({"optimizer": {"name": "sgd", "betas": [0.9, 0.9]}}, "optimizer.betas is not read by sgd"),
        ({"optimizer": {"name": "adam", "momentum": 0.9}}, "optimizer.momentum is not read by adam"),
        ({"optimizer": {"name": "adam", "_target_": "torch.optim.SGD"}}, "optimizer._target_=torch.optim.SGD and"),
        ({"loader": 3}, "loader=3 is not allowed: it should be a group of settings"),
    ],
)
def test_a_mistake_is_one_sentence(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainSettings.of({"out": "x", **settings})
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
