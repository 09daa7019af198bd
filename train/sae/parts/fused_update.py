"""The same update as `update`, with each number of the two matrices read and written once: for a backend with kernels.

In the plain order projection, norm, clip, Adam and renormalisation each pass over the matrices: 104 bytes an entry in
float32, where 56 will do, and 4 an entry of W_dec for the gradient's norm, on which the clip depends and which the
kernel that makes the gradient knows; where AuxK adds to a gradient, the norm is a pass of its own.
Letters: F latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Adam, AdamW, Optimizer

from train.sae.base import SAE
from train.sae.sparse.adam import AdamStep
from train.sae.sparse.backend import FusedKernels
from train.sae.sparse.row_norms import RowNorms, take_norms

MATRICES = ("W_enc_FD", "W_dec")
_UNLIKE = ("amsgrad", "maximize", "differentiable")  # forms of Adam that the kernel does not know


def is_fused_adam(optimizer: Optimizer) -> bool:
    """Say whether the optimizer is torch's Adam or AdamW, asked to be one kernel, in the form that is published."""
    return type(optimizer) in (Adam, AdamW) and all(
        group["fused"] and not any(group[name] for name in _UNLIKE) for group in optimizer.param_groups
    )


@torch.no_grad()
def fused_update(sae: SAE, optimizer: Optimizer, clip: float | None, kernels: FusedKernels) -> None:
    """Move the parameters as `update` does; the matrices' gradients are let go. The host waits for nothing."""
    dots: dict[str, Tensor | None] = {}
    squares: dict[str, Tensor] = {}
    for name in MATRICES:
        weight = sae.get_parameter(name)
        assert weight.grad is not None
        rows = weight if name == "W_dec" and sae.unit_rows else None
        if rows is None and clip is None:
            dots[name] = None
            continue
        # The kernel that made the gradient has said so much of its rows, unless more was added to it.
        norms = take_norms(weight.grad, unit=rows is not None)
        if norms is None:
            dots_F, squares_F = kernels.row_norms(weight.grad, rows)
            norms = RowNorms(squares_F, None if rows is None else dots_F)
        dots[name], squares[name] = norms.dots_F, norms.squares_F
    total = None if clip is None else _total(sae, squares)
    for name in MATRICES:
        weight = sae.get_parameter(name)
        assert weight.grad is not None
        settings, state = _adam_of(optimizer, weight, clip)
        state["step"] += 1
        moments = (state["exp_avg"], state["exp_avg_sq"])
        kernels.adam_rows_(
            weight.grad, weight, *moments, step=state["step"], settings=settings, dots_F=dots[name], total=total
        )
        weight.grad = None
    # What is left is small: torch's own kernels.
    if total is not None:
        assert clip is not None
        clip_grads_with_norm_(_others(sae), clip, total.sqrt())
    optimizer.step()  # passes over what has no gradient


def _others(sae: SAE) -> list[nn.Parameter]:
    return [parameter for name, parameter in sae.named_parameters() if name not in MATRICES]


def _total(sae: SAE, squares: dict[str, Tensor]) -> Tensor:
    """Sum the squares of all gradients, of a split dictionary over its processes; what all have alike counts once."""
    own = torch.cat([squares[name] for name in MATRICES]).sum()
    own_rest: list[Tensor] = []
    replicated: list[Tensor] = []
    for name, parameter in sae.named_parameters():
        if name not in MATRICES and parameter.grad is not None:
            (replicated if name in sae.replicated else own_rest).append(parameter.grad)
    own = own + get_total_norm(own_rest).square()
    return sae.split.sum_(own) + get_total_norm(replicated).square()


def _adam_of(optimizer: Optimizer, weight: nn.Parameter, clip: float | None) -> tuple[AdamStep, dict[str, Any]]:
    """Find a parameter's settings of this step, and its state, which is made as torch's Adam makes it."""
    (group,) = [group for group in optimizer.param_groups if any(weight is other for other in group["params"])]
    state = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    decay_1, decay_2 = group["betas"]
    settings = AdamStep(
        rate=group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"]),
        decay_1=float(decay_1),
        decay_2=float(decay_2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=group["decoupled_weight_decay"],
        clip=clip,
    )
    return settings, state
