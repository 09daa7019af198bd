"""sparsify: cfg.json and sae.safetensors, as `SparseCoder.load_from_disk` reads them. It has TopK, and no other.

It takes relu before the k largest, which are then the same ones, and always subtracts b_dec at the encoder.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save as to_bytes

from data.base.errors import UserError
from data.base.records import Json
from train.interop.fold import subtracting
from train.interop.foreign import (
    OURS,
    Foreign,
    Origin,
    construct,
    fill,
    json_bytes,
    own_record,
    settings_in,
    tensors_in,
    wanted,
)
from train.sae.base import SAE
from train.sae.variants.topk import TopK

CONFIG, WEIGHTS = HOLDS = ("cfg.json", "sae.safetensors")
LOADING = """from sparsify import SparseCoder
sae = SparseCoder.load_from_disk("{folder}")
acts, index, _ = sae.encode(x); x_hat = sae.decode(acts, index)"""

_NAMES = {"encoder.weight": "W_enc_FD", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def files(sae: SAE, origin: Origin) -> dict[str, bytes]:
    """Make the files of an SAE: TopK alone, and without `token`."""
    if not isinstance(sae, TopK):
        raise UserError(
            f"sparsify knows TopK alone and has no threshold, gate or plain relu to hold a {sae.name}: use to=saelens"
        )
    if sae.input_norm == "token":
        raise UserError(
            "sparsify normalises no token, as input_norm=token does: export it with to=saelens, or train with "
            "input_norm=dataset"
        )
    held = subtracting(sae, True)
    assert isinstance(held, TopK)
    config: Json = {
        "activation": "topk",
        "normalize_decoder": True,
        "num_latents": held.width,
        "k": held.config.k,
        "multi_topk": held.config.multi_topk,
        "skip_connection": False,
        "transcode": False,
        "d_in": held.d_in,
        "hookpoint": origin.hook,
        OURS: origin.json(),
    }
    tensors = {theirs: getattr(held, ours).detach().contiguous() for theirs, ours in _NAMES.items()}
    return {WEIGHTS: to_bytes(tensors), CONFIG: json_bytes(config)}


def read(folder: Path) -> Foreign:
    """Read a TopK without skip connection; UserError with the reason for the others."""
    path = folder / CONFIG
    config = settings_in(path)
    if (activation := config.get("activation", "topk")) != "topk":
        raise UserError(f"{path}: the activation {activation} is none of our variants: name a folder with topk")
    if given := [name for name in ("transcode", "skip_connection") if config.get(name, False)]:
        raise UserError(f"{path}: {given[0]} makes it no autoencoder: name a folder without it")
    ours = own_record(config, folder)
    tensors = tensors_in(folder / WEIGHTS, _NAMES)
    width, d_in = tensors["W_dec"].shape
    settings: Json = {"k": wanted(config, "k", path), "input_norm": "none", "apply_b_dec_to_input": True}
    if "multi_topk" in config:
        settings["multi_topk"] = config["multi_topk"]
    sae = construct("topk", ours, d_in=d_in, width=width, **settings)
    tensors["W_enc"] = tensors.pop("W_enc_FD").t()
    return Foreign(fill(sae, tensors, folder), ours.get("site") or config.get("hookpoint"), ours)
