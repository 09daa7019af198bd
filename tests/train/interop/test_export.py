"""Exports against each format's own definition, written out in float64; refusals; the way back."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from data.base.errors import UserError
from data.store.store import Store
from tests.helpers.runs import SITE, activations
from tests.helpers.toy import FORMS
from train.interop import FORMATS
from train.interop.config import FolderSettings
from train.interop.export import export
from train.interop.fold import folded
from train.interop.import_sae import adopt
from train.sae import SAE, VARIANTS, load, load_config, save
from train.sae.variants.matryoshka import Matryoshka

D, F = 16, 64
Array = NDArray[np.float64]
VARIED = ("relu", "relu bricken", "topk", "batchtopk", "matryoshka", "gated", "jumprelu")
RECORD = {
    "site": SITE,
    "fingerprint": "ab" * 32,
    "store": "tiny-ab",
    "model_name": "tiny",
    "packing": {"context": 16, "bos": "document"},
    "training": {"tokens": 1000, "heldout": {"nmse": 0.125, "l0": 4.5, "tokens": 512}},
}


@functools.cache
def make(form: str, **settings: Any) -> SAE:
    """An SAE over the store's activations, only to be read; none of its parameters has a value that hides a mistake."""
    name, own = FORMS[form]
    sae = VARIANTS[name](D, F, **{**own, **settings})
    sae.initialise(torch.from_numpy(activations(1024, 3)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*(sae.get_parameter(bias) for bias in sae.bias_names), sae.b_dec):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        if "r_mag" in sae.state_dict():
            sae.get_parameter("r_mag").add_(0.3 * torch.randn(F, generator=generator))
        if "theta" in sae.state_dict():
            sae.get_parameter("theta").copy_(0.2 + torch.rand(F, generator=generator))
        if "threshold" in sae.state_dict():
            sae.get_buffer("threshold").fill_(0.75)
        if not sae.unit_rows:
            sae.W_dec *= 0.5 + torch.rand(F, 1, generator=generator)
    return sae


def saved(tmp_path: Path, sae: SAE, **record: Any) -> Path:
    save(sae, tmp_path / "sae", {**RECORD, **record})
    return tmp_path / "sae"


def test_an_sae_in_shards_is_exported_as_one_file_is(tmp_path: Path) -> None:
    """The same bytes, in every format that has it, and its tensors where safetensors' own writer would put them."""
    sae = make("topk")
    save(sae, tmp_path / "one", RECORD)
    save(sae, tmp_path / "many", RECORD, shard_bytes=2000)
    for name in FORMATS:
        made = {}
        for source in ("one", "many"):
            export(tmp_path / source, name, tmp_path / source / f"{name} sae")
            made[source] = {path.name: path.read_bytes() for path in (tmp_path / source / f"{name} sae").iterdir()}
        assert made["one"] == made["many"] and len(made["one"]) == 3, name
        for path in (tmp_path / "one" / f"{name} sae").glob("*.safetensors"):
            assert path.read_bytes() == to_bytes(load_file(path))


def relu(z: Array) -> Array:
    return np.maximum(z, 0)


def top(z: Array, k: int) -> Array:
    kept = np.zeros_like(z)
    index = np.argsort(-z, axis=1, kind="stable")[:, :k]
    np.put_along_axis(kept, index, np.take_along_axis(z, index, 1), 1)
    return kept


def in_float64(tensors: dict[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


def by_saelens(folder: Path, x: Array) -> tuple[Array, Array]:
    """What SAELens says its inference classes compute."""
    cfg, p = json.loads((folder / "cfg.json").read_text()), in_float64(load_file(folder / "sae_weights.safetensors"))
    mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    layer_norm = cfg["normalize_activations"] == "layer_norm"
    xn = (x - mean) / (std + 1e-5) if layer_norm else x
    h = (xn - p["b_dec"] * cfg["apply_b_dec_to_input"]) @ p["W_enc"]
    if cfg["architecture"] == "gated":
        f = (h + p["b_gate"] > 0) * relu(h * np.exp(p["r_mag"]) + p["b_mag"])
    elif cfg["architecture"] == "topk":
        f = relu(top(h + p["b_enc"], cfg["k"]))
    elif cfg["architecture"] == "jumprelu":
        f = relu(h + p["b_enc"]) * (h + p["b_enc"] > p["threshold"])
    else:
        assert cfg["architecture"] == "standard"
        f = relu(h + p["b_enc"])
    x_hat = f @ p["W_dec"] + p["b_dec"]
    return f, x_hat * std + mean if layer_norm else x_hat


def by_dictionary_learning(folder: Path, x: Array) -> tuple[Array, Array]:
    p = in_float64(torch.load(folder / "ae.pt", weights_only=True))
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    W_enc = p["encoder.weight"].T if "encoder.weight" in p else p["W_enc"]
    W_dec = p["decoder.weight"].T if "decoder.weight" in p else p["W_dec"]
    b_dec = next(p[key] for key in ("bias", "decoder.bias", "decoder_bias", "b_dec") if key in p)
    b_enc = p.get("encoder.bias", p.get("b_enc", np.zeros(F)))
    z = (x if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec) @ W_enc + b_enc
    if name == "GatedAutoEncoder":
        f = (z + p["gate_bias"] > 0) * relu(z * np.exp(p["r_mag"]) + p["mag_bias"])
    elif name == "AutoEncoderTopK":
        f = top(relu(z), int(p["k"]))
    else:
        f = relu(z) * (z > p.get("threshold", 0.0))
    return f, f @ W_dec + b_dec


def by_sparsify(folder: Path, x: Array) -> tuple[Array, Array]:
    p, cfg = in_float64(load_file(folder / "sae.safetensors")), json.loads((folder / "cfg.json").read_text())
    f = top(relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]), cfg["k"])
    return f, f @ p["W_dec"] + p["b_dec"]


BY: dict[str, Callable[[Path, Array], tuple[Array, Array]]] = {
    "saelens": by_saelens,
    "dictionary_learning": by_dictionary_learning,
    "sparsify": by_sparsify,
}


def cases() -> list[tuple[str, str, str]]:
    all_of = [(to, form, norm) for to in BY for form in VARIED for norm in ("none", "dataset", "token")]
    held = [one for one in all_of if one[0] == "saelens" or one[2] != "token"]
    return [one for one in held if one[0] != "sparsify" or one[1] == "topk"]


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize(("to", "form", "norm"), cases())
def test_the_formats_own_formula_gives_our_f_and_x_hat(
    tmp_path: Path, to: str, form: str, norm: str, subtracts: bool
) -> None:
    sae = make(form, input_norm=norm, apply_b_dec_to_input=subtracts)
    export(saved(tmp_path, sae), to, tmp_path / "out")
    x = torch.from_numpy(activations(256, 9))
    with torch.no_grad():
        f, x_hat = sae.encode_decode(x)
    assert 1 < float((f > 0).float().sum(1).mean()) < F - 1
    theirs_f, theirs_x_hat = BY[to](tmp_path / "out", x.double().numpy())
    norms = np.ones(F) if sae.unit_rows else np.linalg.norm(sae.W_dec.detach().numpy(), axis=1)
    rms = float(x.square().mean().sqrt())
    assert np.abs(theirs_f - f.numpy() / float(sae.norm.scale) * norms).max() < 1e-5 * rms
    if norm == "token":  # SAELens' way back is std x_hat' + mean, ours (std + 1e-5) x_hat' + mean
        mean, std = x.double().mean(1, keepdim=True).numpy(), x.double().std(1, keepdim=True).numpy()
        theirs_x_hat += 1e-5 * (theirs_x_hat - mean) / std
    assert np.abs(theirs_x_hat - x_hat.numpy()).max() < 1e-5 * rms


def test_a_threshold_is_not_passed_by_its_own_value() -> None:
    """> and not >=, as all formats have it."""
    sae = VARIANTS["jumprelu"](2, 2, sparsity=0.1, input_norm="none")
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.get_parameter("theta").fill_(0.5)
        assert sae.encode(torch.tensor([[0.5, 0.625]])).tolist() == [[0.0, 0.625]]


@pytest.mark.parametrize("form", VARIED)
def test_the_folded_sae_has_unit_rows_and_no_scale(form: str) -> None:
    plain = folded(make(form))
    assert float(plain.norm.scale) == 1 and plain.input_norm == "none" and plain.unit_rows
    assert torch.allclose(plain.W_dec.norm(dim=1), torch.ones(F), atol=1e-6)


def test_what_saelens_asks_for_is_in_cfg(tmp_path: Path) -> None:
    for form, norm in (("batchtopk", "dataset"), ("topk", "token")):
        sae = make(form, input_norm=norm)
        export(saved(tmp_path, sae), "saelens", tmp_path / form)
        cfg = json.loads((tmp_path / form / "cfg.json").read_text())
        metadata = cfg["metadata"]
        assert metadata["hook_name"] == "blocks.3.hook_resid_post" and metadata["model_name"] == "tiny"
        assert (metadata["context_size"], metadata["prepend_bos"]) == (16, True)
        assert metadata["sae_lens_version"] == "6.0.0" and metadata["thresher"]["fingerprint"] == "ab" * 32
        assert (cfg["architecture"], cfg["normalize_activations"], cfg.get("k")) == {
            "batchtopk": ("jumprelu", "none", None),
            "topk": ("topk", "layer_norm", 4),
        }[form]
    held = load_file(tmp_path / "batchtopk" / "sae_weights.safetensors")
    assert held["threshold"].shape == (F,) and held.keys() == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}


@pytest.mark.parametrize(
    ("site", "hook", "kind"),
    [
        ("resid_pre.0", "blocks.0.hook_resid_pre", "HookedTransformer"),
        ("attn_out.11", "blocks.11.hook_attn_out", "HookedTransformer"),
        ("transformer.h.2.mlp", "transformer.h.2.mlp", "AutoModelForCausalLM"),
    ],
)
def test_sites_have_their_hook_names(tmp_path: Path, site: str, hook: str, kind: str) -> None:
    export(saved(tmp_path, make("topk"), site=site), "saelens", tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_class_name"]) == (hook, kind)


@pytest.mark.parametrize(
    ("to", "form", "norm", "says"),
    [
        ("dictionary_learning", "topk", "token", r"no class that normalises each token"),
        ("sparsify", "topk", "token", r"normalises no token"),
        ("sparsify", "gated", "none", r"knows TopK alone .* to hold a gated"),
        ("nowhere", "topk", "none", r"to=nowhere is unknown: choose one of saelens, dictionary_learning, sparsify"),
    ],
)
def test_refusals(tmp_path: Path, to: str, form: str, norm: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        export(saved(tmp_path, make(form, input_norm=norm)), to, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_old_record_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, make("topk"))
    with pytest.raises(UserError, match="is there already"):
        export(folder, "saelens", folder)
    save(load(folder), tmp_path / "old", {name: RECORD[name] for name in ("site", "fingerprint", "store")})
    with pytest.raises(UserError, match="does not record its model_name"):
        export(tmp_path / "old", "saelens", tmp_path / "out")


def test_several_go_below_the_folder(tmp_path: Path) -> None:
    for name in ("a", "b[1]"):
        (tmp_path / "saes" / name).mkdir(parents=True)
    given = {"saes": str(tmp_path / "saes" / "*"), "out": "out"}
    assert [str(out) for out in FolderSettings.of(given).folders().values()] == ["out/a", "out/b[1]"]
    alone = tmp_path / "saes" / "b[1]"
    assert FolderSettings.of({"saes": str(alone), "out": "out"}).folders() == {alone: Path("out")}
    for wrong, says in (
        ({"saes": None}, "saes is not set"),
        ({"out": None}, "out is not set"),
        ({"saes": "x*"}, "no folder"),
    ):
        with pytest.raises(UserError, match=says):
            FolderSettings.of({**given, **wrong}).folders()


def test_the_card_has_the_figures_and_the_lines_that_load(tmp_path: Path) -> None:
    folder = saved(tmp_path, make("gated"))
    export(folder, "saelens", tmp_path / "plain")
    text = (tmp_path / "plain" / "README.md").read_text()
    assert 'SAE.load_from_disk("plain")' in text and "ab" * 32 in text
    assert "| NMSE | 0.1250 |" in text and "| L0 | 4.5 |" in text and "512 held-out tokens" in text
    names = ("l0", "nmse", "ev", "ce_increase", "recovered_zero", "recovered_mean", "kl")
    metrics = {name: {"value": 0.5, "se": None if name == "kl" else 0.25} for name in names}
    site = {
        "fingerprint": "ab" * 32,
        "tokens": 999,
        "sequences": 7,
        "saes": [{"folder": str(folder), "metrics": metrics}],
    }
    (tmp_path / "report.json").write_text(json.dumps({"sites": [site]}))
    export(folder, "saelens", tmp_path / "scored", tmp_path / "report.json")
    text = (tmp_path / "scored" / "README.md").read_text()
    assert "| CE increase (nats) | 0.5000 ± 0.2500 |" in text and "999 held-out tokens in 7 contexts" in text
    site["saes"] = [{"folder": str(folder), "metrics": metrics, "form": "batch"}]
    (tmp_path / "report.json").write_text(json.dumps({"sites": [site]}))
    with pytest.raises(UserError, match="as form=batch: name one with form=shipped"):
        export(folder, "saelens", tmp_path / "batch", tmp_path / "report.json")
    site["saes"] = []
    (tmp_path / "report.json").write_text(json.dumps({"sites": [site]}))
    with pytest.raises(UserError, match="has no row of"):
        export(folder, "saelens", tmp_path / "other", tmp_path / "report.json")


# The way back


@pytest.fixture
def store(cache: Path) -> Store:
    return Store.open(next(cache.iterdir()))


@pytest.mark.parametrize(("to", "form", "norm"), cases())
def test_there_and_back_keeps_every_bit(tmp_path: Path, store: Store, to: str, form: str, norm: str) -> None:
    sae = make(form, input_norm=norm)
    export(saved(tmp_path, sae), to, tmp_path / "there")
    adopt(tmp_path / "there", store, None, tmp_path / "back")
    back, plain = load(tmp_path / "back"), folded(sae)
    assert back.name == sae.name and back.input_norm == plain.input_norm
    moved = back.apply_b_dec_to_input != sae.apply_b_dec_to_input  # into the biases, by rounding
    for name, parameter in plain.named_parameters():
        if not (moved and name in sae.bias_names):
            assert torch.equal(parameter, back.get_parameter(name)), name
    if "threshold" in plain.state_dict():
        assert torch.equal(plain.get_buffer("threshold"), back.get_buffer("threshold"))
    if isinstance(sae, Matryoshka):
        assert isinstance(back, Matryoshka) and back.config.sizes == sae.config.sizes
    export(tmp_path / "back", to, tmp_path / "again")
    for file in (tmp_path / "there").iterdir():
        if file.suffix in (".safetensors", ".pt"):
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_an_adopted_sae_is_of_the_store(tmp_path: Path, store: Store) -> None:
    export(saved(tmp_path, make("relu", input_norm="none")), "saelens", tmp_path / "there")
    adopt(tmp_path / "there", store, None, tmp_path / "back")
    config, sae, stats = load_config(tmp_path / "back"), load(tmp_path / "back"), store.stats("train", SITE)
    assert (config["fingerprint"], config["site"]) == (store.manifest.fingerprint, SITE)
    assert config["adopted"] == {"format": "SAELens", "from": "there"}
    assert float(sae.variance) == pytest.approx(stats.variance) and float(sae.mean_sq) == pytest.approx(
        stats.mean_sq_norm
    )


def edit_cfg(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "temporal"}, r"architecture temporal is none of"),
        ({"normalize_activations": "expected_average_only_in"}, r"needs numbers that the folder does not hold"),
        ({"reshape_activations": "hook_z"}, r"takes heads apart"),
        ({"d_sae": 65}, r"is \[16, 64\] and should be \[16, 65\]"),
        ({"metadata": None}, r"cannot|older than SAELens 6|does not say"),
    ],
)
def test_what_is_not_ours_is_refused(tmp_path: Path, store: Store, changes: dict[str, Any], says: str) -> None:
    export(saved(tmp_path, make("topk")), "saelens", tmp_path / "there")
    edit_cfg(tmp_path / "there", **changes)
    with pytest.raises(UserError, match=says) as caught:
        adopt(tmp_path / "there", store, None, tmp_path / "back")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("to", "file", "data", "says"),
    [
        ("saelens", "sae_weights.safetensors", b"\0" * 9, r"sae_weights\.safetensors cannot be read"),
        ("dictionary_learning", "ae.pt", b"not a zip", r"ae\.pt cannot be read"),
        ("dictionary_learning", "config.json", b"[]", r"config\.json is no JSON object"),
        ("sparsify", "cfg.json", b"{", r"cfg\.json is no JSON object"),
        ("sparsify", "cfg.json", b'{"skip_connection": true}', r"skip_connection makes it no autoencoder"),
    ],
)
def test_damage_is_named(tmp_path: Path, store: Store, to: str, file: str, data: bytes, says: str) -> None:
    export(saved(tmp_path, make("topk")), to, tmp_path / "there")
    (tmp_path / "there" / file).write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        adopt(tmp_path / "there", store, None, tmp_path / "back")
    assert "\n" not in str(caught.value)


def test_another_tools_topk_that_chooses_by_the_rows_norms(tmp_path: Path, store: Store) -> None:
    """SAELens' rescale_acts_by_decoder_norm: top k of z ||w||, decoded by w / ||w||."""
    export(saved(tmp_path, make("topk", input_norm="none")), "saelens", tmp_path / "there")
    from safetensors.torch import save_file

    tensors = load_file(tmp_path / "there" / "sae_weights.safetensors")
    norms = 0.5 + torch.rand(F, generator=torch.Generator().manual_seed(2))
    tensors["W_dec"] *= norms[:, None]
    save_file(tensors, tmp_path / "there" / "sae_weights.safetensors")
    edit_cfg(tmp_path / "there", rescale_acts_by_decoder_norm=True)
    adopt(tmp_path / "there", store, None, tmp_path / "back")
    x, p = activations(64, 9).astype(np.float64), in_float64(tensors)
    norm = np.linalg.norm(p["W_dec"], axis=1)
    f = relu(top(((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norm, 4))
    with torch.no_grad():
        ours_f, ours_x_hat = load(tmp_path / "back").encode_decode(torch.from_numpy(x).float())
    assert np.abs(f - ours_f.numpy()).max() < 1e-4
    assert np.abs(f / norm @ p["W_dec"] + p["b_dec"] - ours_x_hat.numpy()).max() < 1e-4


def test_a_threshold_that_was_never_learnt_lets_all_through(tmp_path: Path, store: Store) -> None:
    """dictionary_learning's -1: what it ships is a plain ReLU, and that is what is scored."""
    export(saved(tmp_path, make("batchtopk", input_norm="none")), "dictionary_learning", tmp_path / "there")
    state = torch.load(tmp_path / "there" / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, tmp_path / "there" / "ae.pt")
    adopt(tmp_path / "there", store, None, tmp_path / "back")
    x = torch.from_numpy(activations(64, 9))
    sae = load(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(sae.encode(x), sae.pre_activation(x).relu())


def test_a_mistake_ends_in_one_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "train.interop.export", "to=saelens", f"out={tmp_path / 'x'}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: saes is not set") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
