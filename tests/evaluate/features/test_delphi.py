"""Latents as Delphi's cache: read back by its documented format, and by Delphi itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.agreement import ROOT
from data.base.errors import UserError
from evaluate.config import DelphiSettings
from evaluate.features.delphi import LatentFirings, write_cache
from evaluate.inputs import open_text
from harvest.hooks import Site, run_to
from tests.helpers.settings import stage_config
from train.sae.io import load, save
from train.sae.variants.relu import ReLU

PEERS = ROOT / ".venv-peers/bin/python"
WIDTH = 48


@pytest.fixture
def config(harvested: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path) -> dict[str, Any]:
    manifest = harvested["store"].manifest
    record = {"site": "resid_post.0", "fingerprint": manifest.fingerprint, "store": manifest.folder}
    save(rough_sae(16), tmp_path / "rough", record)
    own = {"device": "cpu", "tokens": 250, "folder": str(tmp_path / "rough"), "out": str(tmp_path / "out"), "splits": 3}
    return stage_config("delphi", cache=harvested["config"]["cache"], **own)


def read_back(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All latents [B, T, F] and the tokens [B, T] of a cache, by the format as Delphi's loader has it."""
    files = {path: load_file(path) for path in folder.glob("*.safetensors")}
    tokens = next(iter(files.values()))["tokens"]
    latents = np.zeros((*tokens.shape, WIDTH), np.float32)
    for path, content in files.items():
        first, last = map(int, path.stem.split("_"))
        assert np.array_equal(content["tokens"], tokens)
        context, position, latent = content["locations"].astype(np.int64).T
        assert latent.max(initial=0) <= last - first
        assert (np.diff(context) >= 0).all()  # Delphi pools what stands together
        latents[context, position, latent + first] = content["activations"]
    return latents, tokens


def test_conf_has_every_setting_with_the_default_of_the_schema() -> None:
    given = stage_config("delphi")
    assert set(given) == set(DelphiSettings.model_fields)
    settings = DelphiSettings.of(given)
    for name, field in DelphiSettings.model_fields.items():
        assert field.description and (field.is_required() or name == "text" or getattr(settings, name) == field.default)


def test_the_files_hold_each_latent_on_each_token(config: dict[str, Any], harvested: dict[str, Any]) -> None:
    folder = write_cache(config)
    assert folder == Path(config["out"]) / "resid_post.0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "0_15.safetensors",
        "16_31.safetensors",
        "32_47.safetensors",
        "config.json",
    ]
    latents, tokens = read_back(folder)
    text = open_text(harvested["store"], config)
    assert np.array_equal(tokens, text.packed.contexts)
    x_BTD = run_to(text.model, [Site.parse("resid_post.0")], torch.from_numpy(tokens).long())["resid_post.0"]
    with torch.no_grad():
        f_BTF = load(Path(config["folder"])).encode(x_BTD.flatten(0, 1)).view(*tokens.shape, WIDTH)
    f_BTF[~torch.from_numpy(text.packed.keep)] = 0
    assert (latents > 0).mean() > 0.1
    np.testing.assert_allclose(latents, f_BTF.numpy(), rtol=1e-4, atol=1e-5)
    said = json.loads((folder / "config.json").read_text())
    assert (said["cache_ctx_len"], said["n_tokens"], said["n_splits"]) == (16, tokens.size, 3)
    assert Path(said["model_name"]) == harvested["root"] / "lm"


def test_a_range_without_a_firing_and_one_beyond_uint16() -> None:
    firings = LatentFirings()
    f_NF = torch.zeros(2, 4)
    f_NF[1, 0] = 2.5
    firings.update(70_000, torch.tensor([[False, True, True]]), f_NF)
    (low, high, location, value), (_, _, none, nothing) = firings.ranges(4, 2)
    assert (low, high) == (0, 1) and location.dtype == np.uint32 and location.tolist() == [[70_000, 2, 0]]
    assert value.tolist() == [2.5] and none.shape == (0, 3) and none.dtype == np.uint16 and len(nothing) == 0


def test_what_a_user_can_get_wrong(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="splits=49 is more than the 48 latents"):
        write_cache({**config, "splits": 49})
    with pytest.raises(UserError, match="folder is empty: name that of one trained SAE"):
        write_cache({**config, "folder": None})
    write_cache(config)
    with pytest.raises(UserError, match="is there already"):
        write_cache(config)


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="no .venv-peers: `make peers` makes it")
def test_delphi_reads_the_same(config: dict[str, Any]) -> None:
    """Its LatentDataset gives the firings of each latent, and examples whose tokens are the contexts'."""
    folder = write_cache(config)
    code = """
import json, sys
import torch
from transformers import AutoTokenizer
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset

folder, name, model = sys.argv[1:]
sampler = SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2)
maker = ConstructorConfig(example_ctx_len=8, min_examples=4, n_non_activating=2)
dataset = LatentDataset(folder, sampler, maker, AutoTokenizer.from_pretrained(model))
firings = {}
for buffer in dataset.buffers:
    for latent in buffer:
        data = latent.activation_data
        firings[latent.latent.latent_index] = [data.locations[:, :2].tolist(), data.activations.tolist()]
examples = {}
for record in dataset:
    one = record.train[0]
    examples[record.latent.latent_index] = [one.tokens.tolist(), one.activations.tolist()]
print(json.dumps([firings, examples, dataset.tokens.tolist()]))
"""
    model = json.loads((folder / "config.json").read_text())["model_name"]
    command = [str(PEERS), "-W", "ignore", "-c", code, str(folder.parent), folder.name, model]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    firings, examples, read_tokens = json.loads(done.stdout.splitlines()[-1])
    latents, tokens = read_back(folder)
    assert read_tokens == tokens.tolist()
    assert set(firings) == {str(i) for i in range(WIDTH) if (latents[..., i] > 0).any()}
    for latent, (places, values) in firings.items():
        context, position = np.array(places).T
        assert (latents[..., int(latent)] > 0).sum() == len(values)
        np.testing.assert_array_equal(latents[context, position, int(latent)], np.float32(values))
    assert len(examples) > WIDTH / 2
    flat = tokens.reshape(-1).tolist()
    for latent, (ids, values) in examples.items():
        starts = [at for at in range(len(flat)) if flat[at : at + len(ids)] == ids]
        rows = latents[..., int(latent)].reshape(-1)
        assert any(np.allclose(rows[at : at + len(ids)], values) for at in starts), latent
