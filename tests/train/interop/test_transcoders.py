"""Transcoders in other tools' folders: each format's own definition in float64, refusals, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from data.base.errors import UserError
from data.store.store import Store
from tests.helpers.runs import activations
from tests.helpers.transcoders import CASES, D, F, make_transcoder, save_transcoder, write_export
from train.interop.config import ImportSettings
from train.interop.export import export, export_set
from train.interop.import_sae import adopt, adopt_set
from train.sae import VARIANTS, load, load_config, save

Array = NDArray[np.float64]


def relu(z: Array) -> Array:
    return np.maximum(z, 0)


def in_float64(path: Path) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in load_file(path).items()}


def by_saelens(folder: Path, x: Array) -> tuple[Array, Array]:
    """What SAELens says its transcoders compute: encode, then forward."""
    cfg, p = json.loads((folder / "cfg.json").read_text()), in_float64(folder / "sae_weights.safetensors")
    assert cfg["apply_b_dec_to_input"] is False and cfg["normalize_activations"] == "none"
    z = x @ p["W_enc"] + p["b_enc"]
    f = relu(z) * (z > p["threshold"]) if cfg["architecture"].startswith("jumprelu") else relu(z)
    y = f @ p["W_dec"] + p["b_dec"]
    return f, y + x @ p["W_skip"].T if "skip" in cfg["architecture"] else y


def by_circuit_tracer(folder: Path, x: Array, layer: int = 0) -> tuple[Array, Array]:
    p = in_float64(folder / f"layer_{layer}.safetensors")
    z = x @ p["W_enc"].T + p["b_enc"]
    threshold = p.get("activation_function.threshold")
    f = relu(z) if threshold is None else z * (z > threshold)
    y = f @ p["W_dec"] + p["b_dec"]
    return f, y + x @ p["W_skip"].T if "W_skip" in p else y


def by_sparsify(folder: Path, x: Array) -> tuple[Array, Array]:
    p, cfg = in_float64(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())
    assert cfg["transcode"]
    z = relu(x @ p["encoder.weight"].T + p["encoder.bias"])
    f = np.where(z >= np.sort(z, 1)[:, [-cfg["k"]]], z, 0)
    y = f @ p["W_dec"] + p["b_dec"]
    return f, y + x @ p["W_skip"].T if cfg["skip_connection"] else y


BY: dict[str, Callable[[Path, Array], tuple[Array, Array]]] = {
    "saelens": by_saelens,
    "circuit_tracer": by_circuit_tracer,
    "sparsify": by_sparsify,
}


@pytest.mark.parametrize(("to", "form", "skip"), CASES)
def test_the_formats_own_formula_gives_our_f_and_prediction(tmp_path: Path, to: str, form: str, skip: bool) -> None:
    sae = make_transcoder(form, skip)
    write_export(to, save_transcoder(tmp_path / "sae", sae), tmp_path / "out")
    x = torch.from_numpy(activations(256, 9))
    f, y = sae.encode_decode(x)
    assert 1 < float((f > 0).float().sum(1).mean()) < F - 1
    theirs_f, theirs_y = BY[to](tmp_path / "out", x.double().numpy())
    norms = np.ones(F) if sae.unit_rows else np.linalg.norm(sae.W_dec.detach().numpy(), axis=1)
    rms = float(y.detach().square().mean().sqrt())
    assert np.abs(theirs_f - f.numpy() / float(sae.norm_out.scale) * norms).max() < 2e-5 * rms
    assert np.abs(theirs_y - y.detach().numpy()).max() < 2e-5 * rms


def test_what_saelens_asks_for_is_in_cfg(tmp_path: Path) -> None:
    export(save_transcoder(tmp_path / "sae", make_transcoder("batchtopk", True)), "saelens", tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu_skip_transcoder" and cfg["d_out"] == D
    metadata = cfg["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == ("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from the 16 entries of `blocks.0.mlp.hook_in` it predicts the 16 of `blocks.0.hook_mlp_out`" in card


def test_a_set_has_one_transcoder_a_layer_and_says_what_it_reads(tmp_path: Path) -> None:
    folders = [
        save_transcoder(
            tmp_path / f"sae-{layer}", make_transcoder("batchtopk", True, layer), f"mlp_in.{layer}", f"mlp_out.{layer}"
        )
        for layer in (1, 0, 2)
    ]
    export_set(folders, tmp_path / "set")
    names = {path.name for path in (tmp_path / "set").iterdir()}
    assert names == {"README.md", "config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors"}
    config: Any = OmegaConf.load(tmp_path / "set" / "config.yaml")
    assert (config.model_kind, config.model_name, config.scan) == ("transcoder_set", "tiny", "tiny-ab")
    assert (config.feature_input_hook, config.feature_output_hook) == ("mlp.hook_in", "hook_mlp_out")
    x = torch.from_numpy(activations(64, 9))
    for layer in range(3):
        y = make_transcoder("batchtopk", True, layer)(x).detach().numpy()
        theirs = by_circuit_tracer(tmp_path / "set", x.double().numpy(), layer)[1]
        assert np.abs(theirs - y).max() < 2e-5 * np.sqrt(np.square(y).mean())
    assert "| 2 | 4.5 | 0.1250 |" in (tmp_path / "set" / "README.md").read_text()


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ([("mlp_in.1", "mlp_out.1")], r"sae-0 is of layer 1 where layer 0 is due: name one SAE a layer"),
        ([("mlp_in.0", "mlp_out.0")] * 2, r"is of layer 0 where layer 1 is due"),
        (
            [("mlp_in.0", "mlp_out.0"), ("resid_mid.1", "mlp_out.1")],
            r"sae-1 differs from .*sae-0 in hooks, width or sto",
        ),
        ([("mlp_in.0", "mlp_out.1")], r"goes from mlp_in\.0 to mlp_out\.1, and .* are of one block each"),
    ],
)
def test_what_is_no_set_is_refused(tmp_path: Path, places: list[tuple[str, str]], says: str) -> None:
    folders = [
        save_transcoder(tmp_path / f"sae-{i}", make_transcoder("relu", False), *place) for i, place in enumerate(places)
    ]
    with pytest.raises(UserError, match=says):
        export_set(folders, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("to", "form", "says"),
    [
        ("saelens", "topk", r"SAELens has no class for a transcoder of topk: train batchtopk, jumprelu or relu"),
        ("saelens", "gated", r"SAELens has no class for a transcoder of gated"),
        ("circuit_tracer", "topk", r"circuit-tracer's loader has no topk \(.*\): train batchtopk"),
        ("dictionary_learning", "relu", r"dictionary_learning has no class for a transcoder of relu: use to=saelens"),
        ("sparsify", "relu", r"sparsify knows TopK alone"),
    ],
)
def test_refusals(tmp_path: Path, to: str, form: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        write_export(to, save_transcoder(tmp_path / "sae", make_transcoder(form, False)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_sae_is_no_part_of_a_set(tmp_path: Path) -> None:
    sae = VARIANTS["relu"](D, F, sparsity=0.1)
    record = {"site": "mlp_out.0", "fingerprint": "ab", "store": "s", "model_name": "m", "packing": {}}
    save(sae, tmp_path / "sae", record)
    with pytest.raises(UserError, match="is no transcoder, and circuit-tracer holds them alone"):
        export_set([tmp_path / "sae"], tmp_path / "set")


# The way back


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of the MLPs' inputs and outputs of a tiny model."""
    from tests.helpers.tiny_lm import harvest_of, tiny_gpt2

    sites = ("mlp_in.0", "mlp_out.0", "mlp_in.1", "mlp_out.1")
    found: Store = harvest_of(tiny_gpt2(), tmp_path_factory.mktemp("transcoders"), sites=sites)["store"]
    return found


@pytest.mark.parametrize(("to", "form", "skip"), CASES)
def test_there_and_back_keeps_the_function(tmp_path: Path, store: Store, to: str, form: str, skip: bool) -> None:
    sae = make_transcoder(form, skip)
    write_export(to, save_transcoder(tmp_path / "sae", sae), tmp_path / "there")
    if to == "circuit_tracer":
        (folder,) = adopt_set(tmp_path / "there", store, None, tmp_path / "back")
    else:
        folder = tmp_path / "back"
        adopt(tmp_path / "there", store, None, folder)
    back, x = load(folder), torch.from_numpy(activations(64, 9))
    assert (back.name, back.site, back.target) == (sae.name, "mlp_in.0", "mlp_out.0")
    y = sae(x).detach()
    assert (back(x).detach() - y).abs().max() < 2e-5 * y.square().mean().sqrt()
    stats, config = store.stats("train", "mlp_out.0"), load_config(folder)
    assert config["target"] == "mlp_out.0" and float(back.variance) == pytest.approx(stats.variance)
    write_export(to, folder, tmp_path / "again")
    for file in (tmp_path / "there").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_set_of_anothers_making_is_taken_at_the_kinds_that_are_given(tmp_path: Path, store: Store) -> None:
    """As those for Llama and Qwen are: mlp.hook_out, which is mlp_out where no norm stands behind the MLP."""
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / f"layer_{layer}.safetensors")
    config = {"model_name": "m", "model_kind": "transcoder_set", "scan": "s"}
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    OmegaConf.save(config | hooks, tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"site 'blocks\.0\.mlp\.hook_out' is not known"):
        adopt_set(tmp_path, store, None, tmp_path / "back")
    folders = adopt_set(tmp_path, store, None, tmp_path / "given", "mlp_out")
    assert [load(folder).target for folder in folders] == ["mlp_out.0", "mlp_out.1"]
    x = torch.from_numpy(activations(8, 9))
    expected = by_circuit_tracer(tmp_path, x.double().numpy(), 1)[1]
    np.testing.assert_allclose(load(folders[1])(x).detach().numpy(), expected, rtol=1e-4, atol=1e-3)


def test_what_reads_before_the_norms_weight_is_refused_whatever_site_is_given(tmp_path: Path, store: Store) -> None:
    export(save_transcoder(tmp_path / "sae", make_transcoder("relu", False)), "saelens", tmp_path / "there")
    path = tmp_path / "there" / "cfg.json"
    cfg = json.loads(path.read_text())
    cfg["metadata"] = {"hook_name": "blocks.0.ln2.hook_normalized", "hook_name_out": "blocks.0.hook_mlp_out"}
    path.write_text(json.dumps(cfg))
    with pytest.raises(UserError, match=r"reads blocks\.0\.ln2\.hook_normalized, which is before the norm's weight"):
        adopt(tmp_path / "there", store, "mlp_in.0", tmp_path / "back")


@pytest.mark.parametrize(
    ("file", "data", "says"),
    [
        ("config.yaml", b"model_kind: [", r"config\.yaml is no YAML of settings"),
        (
            "config.yaml",
            b"model_kind: cross_layer_transcoder",
            r"is of a cross_layer_transcoder, and only a transcoder",
        ),
        ("config.yaml", b"model_kind: transcoder_set", r"does not say feature_input_hook"),
        ("layer_0.safetensors", b"\0" * 9, r"layer_0\.safetensors cannot be read"),
    ],
)
def test_damage_is_named(tmp_path: Path, store: Store, file: str, data: bytes, says: str) -> None:
    export_set([save_transcoder(tmp_path / "sae", make_transcoder("relu", False))], tmp_path / "there")
    (tmp_path / "there" / file).write_bytes(data)
    with pytest.raises(UserError, match=says):
        adopt_set(tmp_path / "there", store, None, tmp_path / "back")


def test_a_target_is_of_transcoders(tmp_path: Path, store: Store) -> None:
    record = {"site": "mlp_out.0", "fingerprint": "ab", "store": "s", "model_name": "m"}
    sae = VARIANTS["relu"](D, F, sparsity=0.1, input_norm="none")
    save(sae, tmp_path / "sae", {**record, "packing": {"context": 16, "bos": "none"}})
    export(tmp_path / "sae", "saelens", tmp_path / "there")
    with pytest.raises(UserError, match=r"is no transcoder, and target=mlp_out\.0 is given: leave it out"):
        adopt(tmp_path / "there", store, "mlp_in.0", tmp_path / "back", "mlp_out.0")
    assert ImportSettings.of({"saes": "x", "target": "mlp_out.0"}).target == "mlp_out.0"
