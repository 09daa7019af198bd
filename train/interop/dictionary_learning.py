"""dictionary_learning: ae.pt, a state dict of torch.save, and config.json, as its `load_dictionary` reads them.

Its AutoEncoder subtracts the bias at the encoder and AutoEncoderNew does not; JumpReluAutoEncoder, when loaded, does
not, all others do. What an SAE of ours does otherwise goes into the latents' biases. All keep z > threshold, as ours.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from data.base.errors import UserError
from data.base.records import Json
from train.interop.fold import subtracting, unit_rows
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
    torch_bytes,
    wanted,
)
from train.sae.base import SAE
from train.sae.variants.matryoshka import Matryoshka
from train.sae.variants.topk_base import TopKBase

CONFIG, WEIGHTS = "config.json", "ae.pt"
HOLDS = (CONFIG, WEIGHTS)
LOADING = """from dictionary_learning.utils import load_dictionary
ae, config = load_dictionary("{folder}", device="cpu")
f = ae.encode(x); x_hat = ae.decode(f)"""

# Their names: ours; a weight of nn.Linear is [out, in].
_LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc"}
_PLAIN = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_CLASSES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**_LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "b_dec"},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "b_dec", "k": "k"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "b_dec", "k": "k", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": {**_PLAIN, "k": "k", "threshold": "threshold", "group_sizes": "group_sizes"},
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "theta"},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        "r_mag": "r_mag",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
    },
}
_OF_VARIANT = {
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "gated": "GatedAutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
}
_VARIANT_OF = {name: variant for variant, name in _OF_VARIANT.items()} | {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu",
}


def files(sae: SAE, origin: Origin) -> Files:
    """Make the files of an SAE: every variant fits; `token` does not."""
    refuse_transcoder(sae, "dictionary_learning", "use to=saelens, circuit_tracer or sparsify")
    if sae.input_norm == "token":
        raise UserError(
            "dictionary_learning has no class that normalises each token, as input_norm=token does: export it with "
            "to=saelens, or train with input_norm=dataset"
        )
    name = _OF_VARIANT.get(sae.name) or ("AutoEncoder" if sae.apply_b_dec_to_input else "AutoEncoderNew")
    if name not in ("AutoEncoder", "AutoEncoderNew"):
        sae = subtracting(sae, name != "JumpReluAutoEncoder")
    state = {theirs: _theirs(sae, theirs, ours) for theirs, ours in _CLASSES[name].items()}
    if name == "AutoEncoderTopK":
        state["threshold"] = torch.tensor(-1.0)  # of a use of it that is not TopK; -1 is none
    trainer: Json = {
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.width,
        "lm_name": origin.model,
        "layer": origin.layer,
        "submodule_name": origin.hook,
    }
    if "k" in state:
        trainer["k"] = int(state["k"])
    buffer = {"d_submodule": sae.d_in, "ctx_len": origin.packing["context"], "io": "out"}
    config = {"trainer": trainer, "buffer": buffer, OURS: origin.json()}
    return {WEIGHTS: torch_bytes(state), CONFIG: json_bytes(config)}


def _theirs(sae: SAE, theirs: str, ours: str) -> Tensor:
    if ours == "k":
        assert isinstance(sae, TopKBase)
        return torch.tensor(sae.config.k, dtype=torch.int)
    if ours == "group_sizes":
        assert isinstance(sae, Matryoshka)
        return torch.tensor([end - start for start, end in zip([0, *sae.config.sizes], sae.config.sizes, strict=False)])
    tensor: Tensor = getattr(sae, ours).detach()
    return (tensor.t() if theirs.endswith(".weight") else tensor).contiguous()


def read(folder: Path) -> Foreign:
    """Read an SAE of any of its classes that is one of our variants, in the units it was saved in."""
    path = folder / CONFIG
    config = settings_in(path)
    trainer = wanted(config, "trainer", path)
    name = wanted(trainer, "dict_class", path)
    if name not in _CLASSES:
        raise UserError(f"{path}: dict_class {name} is none of our variants: name one of {', '.join(_CLASSES)}")
    ours = own_record(config, folder)
    tensors = tensors_in(folder / WEIGHTS, _CLASSES[name])
    for theirs, mine in _CLASSES[name].items():
        if theirs.endswith(".weight"):
            tensors[mine] = tensors[mine].t()
    width, d_in = tensors["W_dec"].shape
    settings: Json = {"d_in": d_in, "width": width, "input_norm": "none"}
    settings["apply_b_dec_to_input"] = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    settings |= _special(name, tensors)
    sae = fill(construct(_VARIANT_OF[name], ours, **settings), tensors, folder)
    return Foreign(sae, ours.get("site") or trainer.get("submodule_name"), ours)


def _special(name: str, tensors: dict[str, Tensor]) -> Json:
    """Take out the settings that stand among the tensors;
    thresholds that relu makes idle become 0."""
    found: Json = {}
    if "k" in tensors:
        found["k"] = int(tensors.pop("k"))
    if "group_sizes" in tensors:
        sizes = list(accumulate(tensors.pop("group_sizes").tolist()))
        found["prefixes"] = [end / sizes[-1] for end in sizes]
    if name in ("AutoEncoder", "AutoEncoderNew"):
        found["form"] = "bricken" if unit_rows(tensors["W_dec"].float()) else "april"
    for threshold in ("threshold", "theta"):
        if threshold in tensors:
            tensors[threshold] = tensors[threshold].clamp_min(0)
    return found
