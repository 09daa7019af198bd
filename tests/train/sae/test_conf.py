"""python -m pytest tests/train/sae/test_conf.py: conf/sae and conf/optimizer say all there is to set, nothing else."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from data.base.cli import CONF
from train.config import OptimizerSettings
from train.optimizers import optimizer_from
from train.run import build
from train.sae import VARIANTS


def test_each_variant_has_its_files() -> None:
    for group in ("sae", "optimizer"):
        assert {path.stem for path in (CONF / group).glob("*.yaml")} == VARIANTS.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_yaml_holds_every_setting_of_its_class(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / "sae" / f"{name}.yaml"))
    assert isinstance(config, dict)
    assert config.pop("expansion") == 8
    assert config["width"] is None
    older = {"k"} if "target_l0" in config else set()
    sae = build({**config, "width": 128, "expansion": None}, d_in=16)
    transcoder = build({**config, "width": 128, "expansion": None}, d_in=16, d_out=8)
    assert config.pop("variant") == name == sae.name
    assert transcoder.settings().keys() - {"d_in", "d_out"} == config.keys() - older
    assert sae.settings().keys() - {"d_in"} == config.keys() - older - {"skip"}
    assert config.pop("skip") is transcoder.settings()["skip"] is False
    # Where null stands for a default that depends on another setting, the class tells what it took.
    wanted = {key: value for key, value in config.items() if key != "width" and value is not None}
    assert {key: sae.settings()[key] for key in wanted} == wanted


@pytest.mark.parametrize("name", VARIANTS)
def test_the_optimizer_holds_plain_values_in_its_state(name: str) -> None:
    config = OmegaConf.load(CONF / "optimizer" / f"{name}.yaml")
    parameter = torch.nn.Parameter(torch.ones(3))
    assert config.optimizer.lr == "auto"
    settings = OmegaConf.to_container(config.optimizer)
    assert isinstance(settings, dict)
    optimizer = optimizer_from(OptimizerSettings.of({**settings, "lr": 1e-3}))([parameter])
    assert isinstance(optimizer, torch.optim.Adam)
    group = optimizer.state_dict()["param_groups"][0]
    assert type(group["betas"]) in (list, tuple)
    assert group["eps"] == 6.25e-10
    assert all(0 <= config[share] <= 1 for share in ("lr_warmup", "lr_decay", "sparsity_warmup"))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_has_a_default_as_in_the_yaml_and_says_what_it_means(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / "sae" / f"{name}.yaml"))
    assert isinstance(config, dict)
    for key, field in VARIANTS[name].Config.model_fields.items():
        assert field.description, f"{name}.{key} does not say what it means"
        if not field.is_required():
            default = [*field.default] if isinstance(field.default, tuple) else field.default
            assert default == config[key], f"{name}.{key}"
