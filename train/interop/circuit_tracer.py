"""circuit-tracer (0.5): a set of transcoders, config.yaml and layer_<n>.safetensors for every layer from 0 on.

Its loader makes JumpReLU of a layer with `activation_function.threshold` [F] and a relu of one without; W_enc is
[F, D], W_skip [D, D] is applied as x W_skip^T. All layers read and write one kind of hook, each in its own block, are
as wide as each other, and predict as many entries as they read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from yaml import YAMLError  # type: ignore[import-untyped]

from data.base.errors import UserError
from data.base.records import Json
from train.interop.fold import folded
from train.interop.foreign import OURS, Files, Foreign, Origin, fill, own_record, tensors_in, wanted
from train.interop.saelens import NO_TOPK, thresholds, transcoder_of
from train.sae import load, load_config
from train.sae.base import SAE
from train.sae.weights_file import TensorFile

CONFIG = "config.yaml"
KIND = "transcoder_set"  # of its `model_kind`
THRESHOLD = "activation_function.threshold"
_LAYER_FILE = re.compile(r"layer_(\d+)\.safetensors")
_NAMES = {"W_enc": "W_enc_FD", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
LOADING = """import yaml
from circuit_tracer.utils.hf_utils import load_transcoders
config = yaml.safe_load(open("{folder}/config.yaml"))
config["transcoders"] = [f"{folder}/layer_{{i}}.safetensors" for i in range({layers})]
transcoders = load_transcoders(config)"""


@dataclass(frozen=True)
class Layer:
    """One transcoder of a set, folded, and where it comes from."""

    folder: Path
    sae: SAE
    origin: Origin

    @property
    def number(self) -> int:
        """Return the layer that it stands for."""
        layer = self.origin.layer
        assert layer is not None
        return layer

    @property
    def hooks(self) -> tuple[str, str]:
        """Return what it reads and writes, as hooks of its block."""
        block = f"blocks.{self.number}."
        return self.origin.hook.removeprefix(block), self.origin.hook_out.removeprefix(block)


def layers_of(folders: Sequence[Path]) -> list[Layer]:
    """Open the transcoders of a set in the order of their layers; UserError where they are none."""
    layers = []
    for folder in folders:
        origin, sae = Origin.of(load_config(folder), folder), folded(load(folder))
        _require_layer(folder, sae, origin)
        layers.append(Layer(folder, sae, origin))
    layers.sort(key=lambda layer: layer.number)
    first = layers[0]
    for expected, layer in enumerate(layers):
        if layer.number != expected:
            raise UserError(
                f"circuit-tracer's set has one transcoder for every layer from 0 on, and {layer.folder} is of layer "
                f"{layer.number} where layer {expected} is due: name one SAE a layer in saes"
            )
        same = (layer.hooks, layer.sae.width, layer.sae.d_in, layer.origin.fingerprint)
        if same != (first.hooks, first.sae.width, first.sae.d_in, first.origin.fingerprint):
            raise UserError(
                f"{layer.folder} differs from {first.folder} in hooks, width or store, and circuit-tracer's set has "
                "the same for every layer: train them as one sweep"
            )
    return layers


def _require_layer(folder: Path, sae: SAE, origin: Origin) -> None:
    """Raise UserError where an SAE is no transcoder that the set can hold."""
    if origin.target is None:
        raise UserError(f"{folder} is no transcoder, and circuit-tracer holds them alone: use to=saelens")
    if sae.name in ("topk", "gated"):
        raise UserError(f"circuit-tracer's loader has no {sae.name} ({folder}): {NO_TOPK}")
    if origin.site.path is not None or origin.target.path is not None or origin.site.layer != origin.target.layer:
        raise UserError(
            f"{folder} goes from {origin.site} to {origin.target}, and circuit-tracer's transcoders are of one block "
            "each: use to=saelens"
        )
    if sae.d_in != sae.d_out:
        raise UserError(
            f"{folder} predicts {sae.d_out} entries from {sae.d_in}, and circuit-tracer's as many as they read"
        )


def files(layers: Sequence[Layer]) -> Files:
    """Make the files of a set, from `layers_of`."""
    made = {f"layer_{layer.number}.safetensors": _weights(layer.sae) for layer in layers}
    first = layers[0]
    read, write = first.hooks
    config: Json = {
        "model_name": first.origin.model,
        "model_kind": KIND,
        "feature_input_hook": read,
        "feature_output_hook": write,
        "scan": first.origin.store,
        OURS: {str(layer.number): layer.origin.json() for layer in layers},
    }
    # The config last, so that a folder with one is whole.
    return {**made, CONFIG: OmegaConf.to_yaml(OmegaConf.create(config)).encode()}


def _weights(sae: SAE) -> TensorFile:
    tensors = {theirs: getattr(sae, ours).detach() for theirs, ours in _NAMES.items()}
    if sae.name != "relu":
        # Its JumpReLU has no relu, so what ours keeps below 0 by one must be below the threshold there.
        tensors[THRESHOLD] = thresholds(sae).clamp_min(0)
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.detach().t()
    return TensorFile(tensors)


def is_set(folder: Path) -> bool:
    """Return whether the folder looks like a set."""
    return (folder / CONFIG).is_file() and any(_LAYER_FILE.fullmatch(path.name) for path in folder.iterdir())


def read(folder: Path) -> dict[int, Foreign]:
    """Read every transcoder of a set by its layer; UserError for what the set's loader would not take either."""
    config = _config(folder / CONFIG)
    if (kind := config.get("model_kind")) != KIND:
        raise UserError(f"{folder / CONFIG} is of a {kind}, and only a {KIND} is read here: name another folder")
    records = config.get(OURS) or {}
    found = sorted(int(match[1]) for path in folder.iterdir() if (match := _LAYER_FILE.fullmatch(path.name)))
    layers: dict[int, Foreign] = {}
    for layer in found:
        ours = own_record({OURS: records.get(str(layer))}, folder) if isinstance(records, Mapping) else {}
        block = f"blocks.{layer}."
        hooks = [
            block + wanted(config, name, folder / CONFIG) for name in ("feature_input_hook", "feature_output_hook")
        ]
        path = folder / f"layer_{layer}.safetensors"
        layers[layer] = Foreign(
            _read_layer(path, ours), ours.get("site") or hooks[0], ours, ours.get("target") or hooks[1]
        )
    return layers


def _read_layer(path: Path, ours: Json) -> SAE:
    tensors = tensors_in(path, {name: name for name in _NAMES})
    extras = load_file(path)
    for theirs, name in ((THRESHOLD, "threshold"), ("W_skip", "W_skip")):
        if theirs in extras:
            tensors[name] = extras[theirs]
    tensors["W_enc"] = tensors["W_enc"].t()
    if (negative := tensors.get("threshold")) is not None and bool((negative < 0).any()):
        raise UserError(f"{path} has thresholds below 0, and its latents may then be negative: none of ours can be")
    width, d_in = tensors["W_enc"].t().shape
    sae, state = transcoder_of(tensors, ours, d_in=d_in, d_out=len(tensors["b_dec"]), width=width)
    return fill(sae, state, path)


def _config(path: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no YAML of settings: restore the folder")
    return {str(name): value for name, value in found.items()}
