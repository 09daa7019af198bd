"""sparsify: cfg.json and sae.safetensors, as `SparseCoder.load_from_disk` reads them. It has TopK, and no other.

It takes relu before the k largest, which are then the same ones, and always subtracts b_dec at the encoder. With
`transcode` it subtracts nothing there; `skip_connection` adds x W_skip^T in `forward`, not in `decode`. What it
predicts is as wide as what it reads.
"""

from __future__ import annotations

from pathlib import Path

from data.base.errors import UserError
from data.base.records import Json
from train.interop.fold import subtracting
from train.interop.foreign import (
    OURS,
    Files,
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
from train.sae.weights_file import TensorFile

CONFIG, WEIGHTS = HOLDS = ("cfg.json", "sae.safetensors")
LOADING = """from sparsify import SparseCoder
sae = SparseCoder.load_from_disk("{folder}")
acts, index, _ = sae.encode(x); x_hat = sae.decode(acts, index)"""

_NAMES = {"encoder.weight": "W_enc_FD", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def files(sae: SAE, origin: Origin) -> Files:
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
    if sae.d_out != sae.d_in:
        raise UserError(
            f"sparsify's transcoders predict as many entries as they read, and this one {sae.d_out} from {sae.d_in}: "
            "there is no format for it, train batchtopk or jumprelu for to=saelens"
        )
    held = sae if sae.transcodes else subtracting(sae, True)
    assert isinstance(held, TopK)
    config: Json = {
        "activation": "topk",
        "normalize_decoder": True,
        "num_latents": held.width,
        "k": held.config.k,
        "multi_topk": held.config.multi_topk,
        "skip_connection": held.W_skip is not None,
        "transcode": held.transcodes,
        "d_in": held.d_in,
        "hookpoint": origin.hook,
        OURS: origin.json(),
    }
    tensors = {theirs: getattr(held, ours).detach() for theirs, ours in _NAMES.items()}
    if held.W_skip is not None:
        tensors["W_skip"] = held.W_skip.detach().t()
    return {WEIGHTS: TensorFile(tensors), CONFIG: json_bytes(config)}


def read(folder: Path) -> Foreign:
    """Read a TopK, with its skip connection where it is a transcoder; UserError with the reason for the others."""
    path = folder / CONFIG
    config = settings_in(path)
    if (activation := config.get("activation", "topk")) != "topk":
        raise UserError(f"{path}: the activation {activation} is none of our variants: name a folder with topk")
    transcodes, skip = bool(config.get("transcode", False)), bool(config.get("skip_connection", False))
    if skip and not transcodes:
        raise UserError(f"{path}: skip_connection makes it no autoencoder: name a folder without it")
    ours = own_record(config, folder)
    tensors = tensors_in(folder / WEIGHTS, _NAMES | ({"W_skip": "W_skip"} if skip else {}))
    width, d_in = tensors["W_dec"].shape
    settings: Json = {"k": wanted(config, "k", path), "input_norm": "none", "apply_b_dec_to_input": not transcodes}
    if "multi_topk" in config:
        settings["multi_topk"] = config["multi_topk"]
    if transcodes:
        settings |= {"d_out": d_in, "skip": skip}
    if skip:
        tensors["W_skip"] = tensors["W_skip"].t()
    sae = construct("topk", ours, d_in=d_in, width=width, **settings)
    tensors["W_enc"] = tensors.pop("W_enc_FD").t()
    return Foreign(fill(sae, tensors, folder), ours.get("site") or config.get("hookpoint"), ours, ours.get("target"))
