"""SAELens (sae_lens 6): cfg.json and sae_weights.safetensors, as `SAE.load_from_disk` reads them.

Its classes keep z > threshold, as ours do, and name x_hat' = f W_dec + b_dec. What ships of BatchTopK and Matryoshka is
its `jumprelu` with the same threshold for each latent: `batchtopk` is a class of its training only, which its loader
does not know. `layer_norm` is our `token`, save that its way back multiplies by std where ours does by std + 1e-5.

Its transcoders are of relu and jumprelu, either with W_skip [d_out, d_in] beside the latents: its `forward` adds
x W_skip^T, its `decode` does not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data.base.errors import UserError
from data.base.records import Json
from train.interop.fold import unit_rows
from train.interop.foreign import (
    OURS,
    Files,
    Foreign,
    Origin,
    construct,
    fill,
    json_bytes,
    own_record,
    refuse_transcoder,
    settings_in,
    tensors_in,
    wanted,
)
from train.sae.base import SAE
from train.sae.variants.topk import TopK
from train.sae.weights_file import TensorFile

CONFIG, WEIGHTS = HOLDS = ("cfg.json", "sae_weights.safetensors")
LOADING = """from sae_lens import SAE
sae = SAE.load_from_disk("{folder}")
f = sae.encode(x); x_hat = sae.decode(f)"""
NO_TOPK = "train batchtopk, jumprelu or relu for it, which it runs by a threshold or a relu"
VERSION = "6.0.0"  # of the layout; without it the loader takes the folder for one of version 5

_ARCHITECTURES = {
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "gated": "gated",
    "jumprelu": "jumprelu",
}
_TRANSCODERS = {
    ("standard", False): "transcoder",
    ("standard", True): "skip_transcoder",
    ("jumprelu", False): "jumprelu_transcoder",
    ("jumprelu", True): "jumprelu_skip_transcoder",
}
_BIASES = {"gated": ("b_gate", "b_mag", "r_mag")}


def files(sae: SAE, origin: Origin) -> Files:
    """Make the files of an SAE: every variant fits, as transcoders those of a relu or a threshold."""
    architecture = _ARCHITECTURES[sae.name]
    if sae.transcodes:
        return _transcoder_files(sae, architecture, origin)
    tensors = {name: getattr(sae, name).detach() for name in _names(architecture)}
    config: Json = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "layer_norm" if sae.input_norm == "token" else "none",
        "reshape_activations": "none",
        "metadata": _metadata(origin),
    }
    if isinstance(sae, TopK):
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    if architecture == "jumprelu":
        tensors["threshold"] = thresholds(sae)
    return {WEIGHTS: TensorFile(tensors), CONFIG: json_bytes(config)}


def _transcoder_files(sae: SAE, architecture: str, origin: Origin) -> Files:
    """Make the files of a transcoder, whose encoder subtracts nothing."""
    if architecture not in ("standard", "jumprelu"):
        refuse_transcoder(sae, "SAELens", NO_TOPK)
    tensors = {name: getattr(sae, name).detach() for name in _names(architecture)}
    if architecture == "jumprelu":
        tensors["threshold"] = thresholds(sae)
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.detach().t()
    config: Json = {
        "architecture": _TRANSCODERS[architecture, sae.W_skip is not None],
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "d_sae": sae.width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {**_metadata(origin), "hook_name_out": origin.hook_out, "hook_head_index_out": None},
    }
    return {WEIGHTS: TensorFile(tensors), CONFIG: json_bytes(config)}


def thresholds(sae: SAE) -> Tensor:
    """Give the threshold of each latent, which BatchTopK and Matryoshka have in common."""
    theta: Tensor = getattr(sae, "theta" if sae.name == "jumprelu" else "threshold").detach()
    return theta.expand(sae.width)


def _names(architecture: str) -> tuple[str, ...]:
    return ("W_enc", "W_dec", "b_dec", *_BIASES.get(architecture, ("b_enc",)))


def _metadata(origin: Origin) -> Json:
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.model,
        "model_class_name": "AutoModelForCausalLM" if origin.site.path else "HookedTransformer",
        "hook_name": origin.hook,
        "hook_head_index": None,
        "context_size": origin.packing["context"],
        "prepend_bos": origin.prepend_bos,
        OURS: origin.json(),
    }


def read(folder: Path) -> Foreign:
    """Read whichever of SAELens' inference classes is one of our variants;
    UserError with the reason for the others."""
    path = folder / CONFIG
    config = settings_in(path)
    metadata = config.get("metadata") or {}
    ours = own_record(metadata, folder)
    if "architecture" not in config or "metadata" not in config:
        raise UserError(f"{path} is older than SAELens 6: load and save it with a newer one")
    architecture, token = config["architecture"], _norm(config, path)
    if architecture in _TRANSCODERS.values():
        return _read_transcoder(folder, config, ours)
    if architecture not in set(_ARCHITECTURES.values()):
        raise UserError(f"{path}: the architecture {architecture} is none of {', '.join(_ARCHITECTURES)}: name another")
    names = (*_names(architecture), *(("threshold",) if architecture == "jumprelu" else ()))
    tensors = tensors_in(folder / WEIGHTS, {name: name for name in names})
    common: Json = {
        "d_in": wanted(config, "d_in", path),
        "width": wanted(config, "d_sae", path),
        "input_norm": token,
        "apply_b_dec_to_input": config.get("apply_b_dec_to_input", True),
    }
    if architecture == "jumprelu":
        sae, tensors = _thresholded(tensors, ours, common)
    elif architecture == "topk":
        if config.get("rescale_acts_by_decoder_norm", False):
            tensors = _unit(tensors)
        sae = construct("topk", ours, k=wanted(config, "k", path), **common)
    elif architecture == "standard":
        # The two forms compute the same f; which of them it is only matters where it is trained on.
        form = "bricken" if unit_rows(tensors["W_dec"].float()) else "april"
        sae = construct("relu", ours, form=form, **common)
    else:
        sae = construct("gated", ours, **common)
    return Foreign(fill(sae, tensors, folder), metadata.get("hook_name"), ours)


def _read_transcoder(folder: Path, config: Json, ours: Json) -> Foreign:
    """Read a transcoder of theirs, or one that we wrote as theirs."""
    path, metadata = folder / CONFIG, config["metadata"]
    ((architecture, skip),) = (key for key, name in _TRANSCODERS.items() if name == config["architecture"])
    if config.get("normalize_activations", "none") != "none":
        raise UserError(f"{path}: a transcoder that normalises its input is none of ours: name one without it")
    names = (
        *_names(architecture),
        *(("threshold",) if architecture == "jumprelu" else ()),
        *(("W_skip",) if skip else ()),
    )
    tensors = tensors_in(folder / WEIGHTS, {name: name for name in names})
    shape = {"d_in": wanted(config, "d_in", path), "d_out": wanted(config, "d_out", path)}
    sae, tensors = transcoder_of(tensors, ours, width=wanted(config, "d_sae", path), **shape)
    site, target = (
        ours.get(name) or metadata.get(key) for name, key in (("site", "hook_name"), ("target", "hook_name_out"))
    )
    return Foreign(fill(sae, tensors, folder), site, ours, target)


def transcoder_of(tensors: dict[str, Tensor], ours: Json, **shape: int) -> tuple[SAE, dict[str, Tensor]]:
    """Make the transcoder that W_enc [D, F], W_dec, b_enc, b_dec and, where there are such, threshold [F] and
    W_skip [E, D] are of; its tensors by our names."""
    tensors = dict(tensors)
    common: Json = {**shape, "input_norm": "none", "apply_b_dec_to_input": False, "skip": "W_skip" in tensors}
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].t()
    if "threshold" in tensors:
        return _thresholded(tensors, ours, common)
    form = "bricken" if unit_rows(tensors["W_dec"].float()) else "april"
    return construct("relu", ours, form=form, **common), tensors


def _norm(config: Json, path: Path) -> str:
    """Choose our `input_norm`; UserError for one whose numbers are not in the folder,
    and for shapes and factors not ours."""
    kind = config.get("normalize_activations", "none")
    if kind not in ("none", "layer_norm"):
        raise UserError(
            f"{path}: normalize_activations={kind} needs numbers that the folder does not hold: fold them in SAELens "
            "(fold_activation_norm_scaling_factor) and save it again"
        )
    if (reshape := config.get("reshape_activations", "none")) != "none":
        raise UserError(f"{path}: reshape_activations={reshape} takes heads apart, and a site here is one vector")
    return "token" if kind == "layer_norm" else "none"


def _thresholded(tensors: dict[str, Tensor], ours: Json, common: Json) -> tuple[SAE, dict[str, Tensor]]:
    """Read a jumprelu, or the BatchTopK or Matryoshka that we wrote as one."""
    theta_F = tensors.pop("threshold").clamp_min(0)  # its relu lets nothing below 0 through
    # Whoever changed a threshold of theirs made a JumpReLU of it.
    if ours.get("variant") in ("batchtopk", "matryoshka") and bool((theta_F == theta_F[0]).all()):
        return construct(ours["variant"], ours, **common), tensors | {"threshold": theta_F[0]}
    return construct("jumprelu", ours, **common), tensors | {"theta": theta_F}


def _unit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn a TopK that chooses by z * ||W_dec_j|| into one with unit rows that chooses by z."""
    norm_F = torch.linalg.vector_norm(tensors["W_dec"].float(), dim=1)
    tensors = dict(tensors)
    tensors["W_dec"] = tensors["W_dec"].float() / norm_F[:, None]
    tensors["W_enc"] = tensors["W_enc"].float() * norm_F
    tensors["b_enc"] = tensors["b_enc"].float() * norm_F
    return tensors
