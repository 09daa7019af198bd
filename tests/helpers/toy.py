"""A toy world: sparse codes of known directions around a mean, and one SAE of each form to be found there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.sae import SAE, VARIANTS, StepOutput, TrainContext
from train.sae.parts.unit_rows import project_gradient_, renormalise_

D, F, K = 16, 64, 4

# Every variant, and every option that changes what it computes.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {"sparsity": 0.05}),
    "relu bricken": ("relu", {"sparsity": 0.05, "form": "bricken", "apply_b_dec_to_input": True}),
    "topk": ("topk", {"k": K}),
    "topk multi": ("topk", {"k": K, "multi_topk": True}),
    "topk reference auxk": ("topk", {"k": K, "auxk_relu": True}),
    "batchtopk": ("batchtopk", {"k": K}),
    "topk lighter auxk": ("topk", {"k": K, "auxk_norm": "variance"}),
    "topk few auxk": ("topk", {"k": K, "auxk_k": 3}),
    "matryoshka": ("matryoshka", {"k": K}),
    "matryoshka of two": ("matryoshka", {"k": K, "prefixes": [0.25, 1.0]}),
    "relu at k": ("relu", {"sparsity": 0.05, "target_l0": 10}),
    "gated": ("gated", {"sparsity": 0.05}),
    "gated at k": ("gated", {"sparsity": 0.05, "target_l0": 10}),
    "jumprelu": ("jumprelu", {"sparsity": 0.005}),
    "jumprelu target": ("jumprelu", {"sparsity": 1.0, "target_l0": 4.0, "bandwidth": 0.01}),
}


def activations(rows: int, seed: int = 0) -> Tensor:
    """[rows, D] float32: about 2.4 of 40 directions a token, off centre, of norm about 13."""
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(rows, 40, generator=generator) * (torch.rand(rows, 40, generator=generator) < 0.06)
    return codes @ directions + 3 + 0.05 * torch.randn(rows, D, generator=generator)


def make(form: str = "batchtopk", **settings: Any) -> SAE:
    """An initialised SAE of the form."""
    name, own = FORMS[form]
    sae = VARIANTS[name](D, F, **{**own, **settings})
    sae.initialise(activations(2048))
    return sae


def train_step(sae: SAE, optimizer: torch.optim.Optimizer, x_BD: Tensor, dead_F: Tensor | None = None) -> StepOutput:
    """What a trainer does with a batch, in its order."""
    step = sae.loss(sae.norm.normalise(x_BD), TrainContext(dead_F=dead_F))
    optimizer.zero_grad()
    step.loss.backward()
    if sae.unit_rows:
        project_gradient_(sae.W_dec)
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    if sae.unit_rows:
        renormalise_(sae.W_dec)
    sae.after_step(step)
    return step


def train(sae: SAE, steps: int, *, lr: float = 3e-3, batch: int = 128) -> list[StepOutput]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    batches = (activations(batch, seed=1000 + i).to(sae.b_dec.device) for i in range(steps))
    return [train_step(sae, optimizer, x_BD) for x_BD in batches]


def f_of(step: StepOutput) -> Tensor:
    """The training form's f [B, F]."""
    return step.codes.dense(step.codes.values)
