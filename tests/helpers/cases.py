"""The losses' cases for the float64 references: B = 12 tokens, D = 8, F = 24."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers import reference
from train.sae import SAE, VARIANTS
from train.sae.variants.batchtopk import BatchTopKBase

DEAD = np.arange(24) % 3 == 0  # 8 dead latents, and k_aux = 4


@dataclass
class Case:
    name: str
    settings: dict[str, Any]
    compute: Callable[..., reference.Result]
    options: dict[str, Any] = field(default_factory=dict)
    uses_dead: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


def topk_cases() -> list[Case]:
    aux = [
        ({}, {}),
        ({"auxk_relu": True}, {"relu": True}),
        ({"auxk_norm": "variance"}, {"by_residual": False}),
        ({"auxk_alpha": 0.5}, {"alpha": 0.5}),
        ({"auxk_k": 2}, {"k_aux": 2}),
    ]
    sizes = {"batchtopk": (None,), "matryoshka": (3, 12, 24)}
    prefixes = {"matryoshka": {"prefixes": [1 / 8, 1 / 2, 1.0]}}
    cases = [Case("topk", {"k": 3, **s}, reference.topk, {"k": 3, **o}, True) for s, o in aux]
    cases.append(Case("topk", {"k": 3, "multi_topk": True}, reference.topk, {"k": 3, "multi": True}, True))
    for name, nested in sizes.items():
        for s, o in aux:
            settings = {"k": 3, **prefixes.get(name, {}), **s}
            cases.append(Case(name, settings, reference.batchtopk, {"k": 3, "sizes": nested, **o}, True))
    return cases


CASES = [
    Case("relu", {"sparsity": 0.3, "form": "april"}, reference.relu, {"sparsity": 0.3, "form": "april"}),
    Case("relu", {"sparsity": 0.3, "form": "bricken"}, reference.relu, {"sparsity": 0.3, "form": "bricken"}),
    *topk_cases(),
    Case("gated", {"sparsity": 0.3}, reference.gated, {"sparsity": 0.3}),
    Case("jumprelu", {"sparsity": 0.3, "bandwidth": 0.4}, reference.jumprelu, {"sparsity": 0.3, "eps": 0.8}),
    *(
        Case(
            "jumprelu",
            {"sparsity": 0.3, "bandwidth": 0.4, "target_l0": target, "target_form": form},
            reference.jumprelu,
            {"sparsity": 0.3, "eps": 0.8, "target": target, "form": form},
        )
        for target in (5.0, 20.0)
        for form in ("log", "square")
    ),
]


def perturbed(case: Case, centred: bool, **more: Any) -> SAE:
    """In float64, with nothing at a special value: biases, rows that are not unit, Vx = 2.5, E||x'||^2 = 4."""
    settings = {"input_norm": "none", "apply_b_dec_to_input": centred, **case.settings, **more}
    sae = VARIANTS[case.name](8, 24, **settings).double()
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
            if name == "theta":
                parameter.abs_()
        sae.variance.fill_(2.5)
        sae.mean_sq.fill_(4.0)
        if sae.transcodes:
            sae.centre.copy_(0.3 * torch.randn(8, generator=noise, dtype=torch.float64))
        if isinstance(sae, BatchTopKBase):
            sae.threshold.fill_(0.75)
    return sae


def tokens(width: int = 8, seed: int = 3) -> Tensor:
    return torch.randn(12, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_formula(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters or gradients by the formula's names and shapes."""
    return {"W_enc" if name == "W_enc_FD" else name: a.T if name == "W_enc_FD" else a for name, a in parts.items()}
