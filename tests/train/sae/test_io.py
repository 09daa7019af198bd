"""python -m pytest tests/train/sae/test_io.py: what stands on disk, and what is said of a folder that is not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.base.errors import UserError
from tests.helpers.toy import D, F, make
from train.sae import load, load_config, save

RECORD = {"site": "resid_post.3", "fingerprint": "abc", "training": {"tokens": 1000}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(make("batchtopk"), tmp_path / "sae", RECORD)
    return tmp_path / "sae"


def test_the_folder_holds_two_files_of_names_and_numbers(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sae.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config == load_config(folder)
    assert (config["format"], config["variant"], config["site"]) == (1, "batchtopk", "resid_post.3")
    assert config["settings"]["k"] == 4
    assert "train.sae" not in json.dumps(config)  # names, no import paths
    tensors = load_file(folder / "sae.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "W_enc": (D, F),
        "W_dec": (F, D),
        "b_enc": (F,),
        "b_dec": (D,),
        "norm.scale": (),
        "variance": (),
        "mean_sq": (),
        "threshold": (),
        "threshold_weight": (),
        "skipped_batches": (),
    }


def test_saving_again_replaces(folder: Path) -> None:
    other = make("gated")
    save(other, folder, {})
    loaded = load(folder)
    assert loaded.name == "gated"
    assert torch.equal(loaded.W_dec, other.W_dec)


def test_a_save_that_fails_leaves_no_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.sae.io.write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        save(make("topk"), folder, {})
    with pytest.raises(UserError, match="no trained SAE"):
        load(folder)


def test_a_record_that_is_not_json_is_a_fault_before_anything_is_written(folder: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save(make("topk"), folder, {"loss": float("nan")})
    assert load(folder).name == "batchtopk"


def edit(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config[key] = {**config[key], **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def truncate(folder: Path) -> None:
    data = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.safetensors").write_bytes(data[: len(data) // 2])


def flip(folder: Path) -> None:
    data = bytearray((folder / "sae.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "sae.safetensors").write_bytes(data)


def poison(folder: Path) -> None:
    tensors = load_file(folder / "sae.safetensors")
    tensors["W_dec"][3, 2] = torch.nan
    save_file(tensors, folder / "sae.safetensors")


def without_hash(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """The damage to a folder of an earlier version, whose config.json has no checksum."""

    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config["weights_sha256"]
        (folder / "config.json").write_text(json.dumps(config))
        damage(folder)

    return apply


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no trained SAE"),
        (lambda folder: (folder / "config.json").write_text('{"format": 1,'), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not describe an SAE"),
        (edit(format=3), "format 3 and this version reads 1 and 2"),
        (edit(variant="vq"), "variant 'vq'.*relu, topk, batchtopk, matryoshka, gated, jumprelu"),
        (edit(settings={"k": 1000}), "k=1000"),
        (edit(settings={"colour": 1}), "does not fit its config.json .*colour is no setting"),
        (edit(settings={"width": 128}), "does not fit its config.json"),
        (edit(variant="topk", settings={"multi_topk": False}), "does not fit its config.json"),
        (lambda folder: (folder / "sae.safetensors").unlink(), "sae.safetensors is missing"),
        (truncate, "sae.safetensors is damaged, its checksum"),
        (flip, "sae.safetensors is damaged, its checksum"),
        (edit(weights_sha256="0" * 64), "checksum"),
        (without_hash(truncate), "does not fit its config.json"),
        (without_hash(poison), "values in W_dec that are not finite"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(folder: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=sentence) as told:
        load(folder)
    assert "\n" not in str(told.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere holds no trained SAE"):
        load(tmp_path / "nowhere")


def test_a_folder_of_an_earlier_version_loads_as_it_was(folder: Path) -> None:
    """No checksum, the settings that are trained no more, and `k` for the L0 aimed at."""
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    config["settings"] |= {"selection": "quantile", "auxk_over": "batch", "auxk_norm": "variance"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).name == "batchtopk"
    sae = make("gated at k")
    save(sae, folder, {})
    config = json.loads((folder / "config.json").read_text())
    config["settings"]["k"] = config["settings"].pop("target_l0")
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(folder)
    assert loaded.settings() == sae.settings() and loaded.settings()["target_l0"] == 10


def test_what_is_trained_no_more_is_refused_in_training() -> None:
    assert make("batchtopk", selection="batch", auxk_over="token").settings() == make("batchtopk").settings()
    with pytest.raises(UserError, match="selection=quantile is trained no more"):
        make("batchtopk", selection="quantile")
    with pytest.raises(UserError, match="k=4 is an older name of target_l0=8"):
        make("gated", k=4, target_l0=8)


def test_a_loaded_sae_says_what_it_is(folder: Path) -> None:
    assert repr(load(folder)) == "SAE(batchtopk, d=16, F=64, k=4, site=resid_post.3)"
    assert repr(make("gated at k")) == "SAE(gated, d=16, F=64, target_l0=10)"
