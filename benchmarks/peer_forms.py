"""In the peers' environment: what other tools make of exported folders.

    .venv-peers/bin/python -m benchmarks.peer_forms < jobs.json

jobs.json: [{"format", "folder", "x": a safetensors file with x [N, D], "to": the file to write with f [N, F], x_hat}].
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


def _saelens(folder: str, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    from sae_lens import SAE

    sae: Any = SAE.load_from_disk(folder)
    f_NF = sae.encode(x_ND)
    # A transcoder's skip is in its forward alone.
    return f_NF, sae(x_ND) if hasattr(sae, "W_skip") else sae.decode(f_NF)


def _dictionary_learning(folder: str, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    from dictionary_learning.utils import load_dictionary

    ae, _ = load_dictionary(folder, device="cpu")
    f_NF = ae.encode(x_ND)
    return f_NF, ae.decode(f_NF)


def _sparsify(folder: str, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)
    values, index, _ = sae.encode(x_ND)
    f_NF = torch.zeros(len(x_ND), sae.num_latents).scatter_(1, index, values)
    return f_NF, sae(x_ND).sae_out if sae.W_skip is not None else sae.decode(values, index)


def _circuit_tracer(folder: str, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Load a set and give what its first layer makes of x."""
    import yaml  # type: ignore[import-untyped]
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    config = yaml.safe_load(Path(folder, "config.yaml").read_text())
    paths = dict(enumerate(sorted(str(path) for path in Path(folder).glob("layer_*.safetensors"))))
    hooks = {name: config[name] for name in ("scan", "feature_input_hook", "feature_output_hook")}
    transcoder = load_transcoder_set(paths, **hooks, device=torch.device("cpu"))[0]
    return transcoder.encode(x_ND), transcoder(x_ND)


FORMS = {
    "saelens": _saelens,
    "dictionary_learning": _dictionary_learning,
    "sparsify": _sparsify,
    "circuit_tracer": _circuit_tracer,
}


def main() -> None:
    warnings.simplefilter("ignore")
    with torch.no_grad():
        for job in json.load(sys.stdin):
            x_ND = load_file(job["x"])["x"]
            f_NF, x_hat_ND = FORMS[job["format"]](job["folder"], x_ND)
            save_file({"f": f_NF.contiguous(), "x_hat": x_hat_ND.contiguous()}, job["to"])


if __name__ == "__main__":
    main()
