"""Transcoders to be exported, and every case of format, variant and skip that other tools have a class for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from tests.helpers.runs import activations
from tests.helpers.toy import FORMS
from train.interop.export import export, export_set
from train.sae import SAE, VARIANTS, StartRows, save

D, F = 16, 64
RELU_OR_THRESHOLD = ("relu", "relu bricken", "batchtopk", "matryoshka", "jumprelu")
CASES = [
    (to, form, skip)
    for to, forms in (("saelens", RELU_OR_THRESHOLD), ("circuit_tracer", RELU_OR_THRESHOLD), ("sparsify", ("topk",)))
    for form in forms
    for skip in (False, True)
]


@functools.cache
def make_transcoder(form: str, skip: bool, layer: int = 0, norm: str = "dataset") -> SAE:
    """A transcoder of the store's activations, only to be read; no parameter has a value that hides a mistake."""
    name, own = FORMS[form]
    own = {key: value for key, value in own.items() if key != "apply_b_dec_to_input"}
    sae = VARIANTS[name](D, F, D, **{**own, "skip": skip, "input_norm": norm})
    x, y = torch.from_numpy(activations(1024, 3)), torch.from_numpy(activations(1024, 4)) * 3 + 1
    sae.initialise(x, target=StartRows(y))
    generator = torch.Generator().manual_seed(1 + layer)
    with torch.no_grad():
        for parameter in (*(sae.get_parameter(bias) for bias in sae.bias_names), sae.b_dec):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        if sae.W_skip is not None:
            sae.W_skip.copy_(0.1 * torch.randn(D, D, generator=generator))
        if "theta" in sae.state_dict():
            sae.get_parameter("theta").copy_(0.2 + torch.rand(F, generator=generator))
        if "threshold" in sae.state_dict():
            sae.get_buffer("threshold").fill_(0.75)
        if not sae.unit_rows:
            sae.W_dec *= 0.5 + torch.rand(F, 1, generator=generator)
    return sae


def save_transcoder(folder: Path, sae: SAE, site: str = "mlp_in.0", target: str = "mlp_out.0") -> Path:
    record = {
        "site": site,
        "target": target,
        "fingerprint": "ab" * 32,
        "store": "tiny-ab",
        "model_name": "tiny",
        "packing": {"context": 16, "bos": "document"},
        "training": {"tokens": 1000, "heldout": {"nmse": 0.125, "l0": 4.5, "tokens": 512}},
    }
    save(sae, folder, record)
    return folder


def write_export(to: str, folder: Path, out: Path) -> None:
    if to == "circuit_tracer":
        export_set([folder], out)
    else:
        export(folder, to, out)
