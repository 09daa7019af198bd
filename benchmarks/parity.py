"""make peers && .venv-peers/bin/python -m benchmarks.parity: loss, reconstruction and every gradient beside the peers'.

With weights copied across and one batch, each peer's own loss is differentiated by its own code. Writes what it finds
to benchmarks/parity.json, which tests/benchmarks/test_parity.py compares with ours and with a reference by hand, and
prints where they part. Vx = 1 here, so that a summed squared error is our NMSE, but for sparsify, which divides by the
batch's variance. Of the peers only sparsify trains transcoders; its AuxK, which gives the encoder no gradient, is left
out of theirs. Letters: B tokens in a batch, D model width, F latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RECORD = Path(__file__).parent / "parity.json"
B, D, F, K = 6, 4, 12, 2
DEAD = np.arange(F) % 3 == 0  # 4 latents, and AuxK takes 2
PREFIXES = [0.25, 0.5, 1.0]
SPARSITY, BANDWIDTH = 0.3, 0.4
AUXK = {"k": K, "auxk_k": D // 2}

Arrays = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Case:
    """Our variant and settings for one loss of a peer, and in what it departs from the paper, where it does.

    skip: of a transcoder, whether it has one; None for an SAE.
    """

    variant: str
    settings: dict[str, Any]
    departs: str = ""
    skip: bool | None = None

    @property
    def gates(self) -> bool:
        return self.variant == "gated"

    @property
    def transcodes(self) -> bool:
        return self.skip is not None


_RESIDUAL = {**AUXK, "auxk_relu": True, "auxk_norm": "residual"}
_VARIANCE = {**AUXK, "auxk_norm": "variance"}
CASES = {
    "dictionary_learning relu": Case("relu", {"sparsity": SPARSITY, "apply_b_dec_to_input": True}),
    "dictionary_learning topk": Case("topk", _RESIDUAL),
    "dictionary_learning batchtopk": Case("batchtopk", _RESIDUAL),
    "dictionary_learning matryoshka": Case(
        "matryoshka",
        {**_RESIDUAL, "prefixes": PREFIXES},
        "averages the prefixes' errors, twice, where the paper sums them",
    ),
    "dictionary_learning gated": Case("gated", {"sparsity": SPARSITY}),
    "dictionary_learning jumprelu": Case(
        "jumprelu",
        {"sparsity": 1.0, "k": 3.0, "target_form": "square", "bandwidth": BANDWIDTH, "apply_b_dec_to_input": False},
        "takes L0's step after the jump, so that half of the kernel gives theta no gradient",
    ),
    "sae-lens relu": Case("relu", {"sparsity": SPARSITY, "apply_b_dec_to_input": True}),
    "sae-lens topk": Case("topk", {**_VARIANCE, "auxk_alpha": 1.0}),
    "sae-lens batchtopk": Case("batchtopk", {**_VARIANCE, "auxk_alpha": 1.0}),
    "sae-lens gated": Case(
        "gated", {"sparsity": SPARSITY}, "detaches no decoder in the auxiliary error and weighs L1 by its rows' lengths"
    ),
    "sae-lens jumprelu": Case("jumprelu", {"sparsity": SPARSITY, "bandwidth": BANDWIDTH, "apply_b_dec_to_input": True}),
    "sparsify topk": Case(
        "topk",
        {**_VARIANCE, "auxk_relu": True, "multi_topk": True},
        "gives the encoder no gradient of AuxK and Multi-TopK",
    ),
    "sparsify transcoder": Case("topk", {"k": K, "auxk_alpha": 0.0}, skip=False),
    "sparsify skip transcoder": Case("topk", {"k": K, "auxk_alpha": 0.0}, skip=True),
}


def batch() -> NDArray[np.float64]:
    """Return x [B, D]."""
    return np.random.default_rng(3).normal(size=(B, D)).round(3)


def target_rows() -> NDArray[np.float64]:
    """Return y [B, D], what a transcoder is to predict."""
    return np.random.default_rng(5).normal(size=(B, D)).round(3) + 0.5


def parameters(case: Case) -> Arrays:
    """Return weights with nothing at a special value but unit rows of W_dec, of `relu` too large ones; by our names."""
    rng = np.random.default_rng(7)
    W_dec = rng.normal(size=(F, D))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    values = {"W_enc": W_dec.T + 0.3 * rng.normal(size=(D, F)), "b_dec": 0.3 * rng.normal(size=D)}
    values["W_dec"] = W_dec * (1.5 if case.variant == "relu" else 1.0)
    biases = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "theta")}.get(case.variant, ("b_enc",))
    values |= {name: 0.3 * rng.normal(size=F) for name in biases}
    if "theta" in values:
        values["theta"] = np.abs(values["theta"])
    if case.skip:
        values["W_skip"] = 0.3 * rng.normal(size=(D, D))
    return {name: value.round(3) if name != "W_dec" else value for name, value in values.items()}


def scale(name: str) -> float:
    """Return vx of ours beside this peer."""
    y = target_rows() if CASES[name].transcodes else batch()
    return float(((y - y.mean(0)) ** 2).sum() / len(y)) if name.startswith("sparsify") else 1.0


def ours(name: str) -> tuple[float, Arrays]:
    """Return our loss, and x_hat and the gradients by name, in float64."""
    from train.sae import VARIANTS, TrainContext

    case, values = CASES[name], parameters(CASES[name])
    transcoder: dict[str, Any] = {"d_out": D, "skip": case.skip} if case.transcodes else {}
    sae = VARIANTS[case.variant](D, F, input_norm="none", **case.settings, **transcoder).double()
    with torch.no_grad():
        for key, value in values.items():
            getattr(sae, key).copy_(torch.from_numpy(value))
        sae.variance.fill_(scale(name))
        sae.mean_sq.fill_(1.0)
    target_BE = torch.from_numpy(target_rows()) if case.transcodes else None
    step = sae.loss(torch.from_numpy(batch()), TrainContext(dead_F=torch.from_numpy(DEAD), target_BE=target_BE))
    step.loss.backward()  # type: ignore[no-untyped-call]
    grads = {key: p.grad for key, p in sae.named_parameters() if p.grad is not None}
    grads["W_enc"] = grads.pop("W_enc_FD").t()
    return float(step.loss.detach()), {key: grad.numpy() for key, grad in (grads | {"x_hat": step.xn_hat_BD}).items()}


def _copy(target: dict[str, tuple[Tensor, bool]], values: Arrays) -> None:
    """Copy our arrays into a peer's parameters; each says whether it is the transposed."""
    with torch.no_grad():
        for name, (parameter, turned) in target.items():
            value = torch.from_numpy(values[name])
            parameter.copy_(value.t() if turned else value)


def _gradients(target: dict[str, tuple[Tensor, bool]]) -> Arrays:
    gradients = {}
    for name, (parameter, turned) in target.items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients[name] = (grad.t() if turned else grad).double().numpy()
    return gradients


Result = tuple[float, Arrays]


def _dictionary_learning(case: Case) -> Result:
    from benchmarks.contestants.dictionary_learning import TRAINERS

    each: dict[str, dict[str, Any]] = {
        "relu": {"l1_penalty": SPARSITY},
        "gated": {"l1_penalty": SPARSITY},
        "jumprelu": {"bandwidth": BANDWIDTH, "target_l0": 3.0, "sparsity_penalty": 1.0},
        "matryoshka": {"k": K, "group_fractions": [0.25, 0.25, 0.5]},
    }
    wanted = each.get(case.variant, {"k": K})
    trainer = TRAINERS[case.variant](
        steps=10**6, activation_dim=D, dict_size=F, layer=0, lm_name="none", lr=1e-3, device="cpu", **wanted
    )
    ae = trainer.ae.double()
    if case.variant in ("jumprelu", "matryoshka"):
        target = {name: (getattr(ae, name), False) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        if case.variant == "jumprelu":
            target["theta"] = (ae.threshold, False)
    else:
        target = {"W_enc": (ae.encoder.weight, True), "W_dec": (ae.decoder.weight, True)}
        if case.gates:
            names = {"b_gate": ae.gate_bias, "b_mag": ae.mag_bias, "r_mag": ae.r_mag, "b_dec": ae.decoder_bias}
        else:
            names = {"b_enc": ae.encoder.bias, "b_dec": ae.bias if case.variant == "relu" else ae.b_dec}
        target |= {name: (parameter, False) for name, parameter in names.items()}
    _copy(target, parameters(case))
    if hasattr(trainer, "num_tokens_since_fired"):
        # It counts the batch before it looks: these count as dead whatever fires in it.
        trainer.dead_feature_threshold = torch.where(torch.from_numpy(DEAD), -1, 10**18)
    with patch.object(trainer, "update_threshold", lambda f: None, create=True):
        loss = trainer.loss(torch.from_numpy(batch()), step=10**5)
    loss.backward()
    x = torch.from_numpy(batch())
    f = ae.encode(x, use_threshold=False) if case.variant in ("batchtopk", "matryoshka") else ae.encode(x)
    return float(loss.detach()), _gradients(target) | {"x_hat": ae.decode(f).detach().numpy()}


def _sae_lens(case: Case) -> Result:
    from sae_lens.saes.sae import TrainStepInput

    from benchmarks.contestants.sae_lens import _CLASSES

    each: dict[str, dict[str, Any]] = {
        "jumprelu": {"jumprelu_bandwidth": BANDWIDTH, "l0_coefficient": SPARSITY},
        "topk": {"k": K, "rescale_acts_by_decoder_norm": False},
        "batchtopk": {"k": K, "rescale_acts_by_decoder_norm": False},
    }
    wanted = each.get(case.variant, {"l1_coefficient": SPARSITY})
    cls, config = _CLASSES[case.variant]
    sae = cls(config(d_in=D, d_sae=F, device="cpu", dtype="float64", **wanted))
    names = {
        **{name: name for name in parameters(case)},
        **({"theta": "threshold"} if case.variant == "jumprelu" else {}),
    }
    target = {ours_: (getattr(sae, theirs), False) for ours_, theirs in names.items()}
    _copy(target, parameters(case))
    coefficients = {name: coefficient.value for name, coefficient in sae.get_coefficients().items()}
    step = sae.training_forward_pass(
        TrainStepInput(torch.from_numpy(batch()), coefficients, torch.from_numpy(DEAD), 0, False)
    )
    step.loss.backward()
    return float(step.loss.detach()), _gradients(target) | {"x_hat": step.sae_out.detach().numpy()}


def _sparsify(case: Case) -> Result:
    with patch("torch.cuda.is_bf16_supported", return_value=False):
        from sparsify.sparse_coder import SparseCoder, SparseCoderConfig
    form = {"transcode": True, "skip_connection": case.skip} if case.transcodes else {"multi_topk": True}
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **form), "cpu", torch.float64)
    weights = {
        "W_enc": (sae.encoder.weight, True),
        "b_enc": (sae.encoder.bias, False),
        "W_dec": (sae.W_dec, False),
        "b_dec": (sae.b_dec, False),
    }
    if case.skip:
        weights["W_skip"] = (sae.W_skip, True)
    _copy(weights, parameters(case))
    if case.transcodes:
        out = sae(torch.from_numpy(batch()), torch.from_numpy(target_rows()))
        out.fvu.backward()
        return float(out.fvu.detach()), _gradients(weights) | {"x_hat": out.sae_out.detach().numpy()}
    out = sae(torch.from_numpy(batch()), dead_mask=torch.from_numpy(DEAD))
    loss = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
    loss.backward()
    x_hat = sae.decode(*sae.encode(torch.from_numpy(batch()))[:2])  # with Multi-TopK, out.sae_out is that by 4k
    return float(loss.detach()), _gradients(weights) | {"x_hat": x_hat.detach().numpy()}


PEERS: dict[str, Callable[[Case], Result]] = {
    "dictionary_learning": _dictionary_learning,
    "sae-lens": _sae_lens,
    "sparsify": _sparsify,
}


def record() -> dict[str, Any]:
    """Return every peer's loss, x_hat and gradients."""
    recorded = {}
    for name, case in CASES.items():
        loss, arrays = PEERS[name.split()[0]](case)
        recorded[name] = {"loss": loss, **{key: np.round(value, 9).tolist() for key, value in sorted(arrays.items())}}
    return recorded


def apart(name: str, theirs: dict[str, Any]) -> dict[str, float]:
    """Return the largest difference from ours, of the loss and each array, relative to the largest entry of ours."""
    loss, arrays = ours(name)
    distances = {"loss": abs(loss - theirs["loss"]) / abs(loss)}
    return distances | {
        key: float(np.abs(value - np.asarray(theirs[key])).max() / np.abs(value).max())
        for key, value in sorted(arrays.items())
    }


def main() -> None:
    recorded = record()
    RECORD.write_text(json.dumps(recorded) + "\n")
    print("largest difference from ours, relative to ours' largest entry (loss; x_hat; gradients)")
    for name, theirs in recorded.items():
        figures = "  ".join(f"{key} {value:.0e}" for key, value in apart(name, theirs).items())
        print(f"{name:32} {figures}")
        if CASES[name].departs:
            print(f"{'':32} it {CASES[name].departs}; ours follows the paper")


if __name__ == "__main__":
    main()
