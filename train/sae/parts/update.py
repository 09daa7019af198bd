"""What follows a backward: one optimizer step with its projection, clipping and renormalisation, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.sae.base import SAE
from train.sae.parts.fused_update import fused_update, is_fused_adam
from train.sae.parts.unit_rows import project_gradient_, renormalise_
from train.sae.sparse.backend import backend_for


def update(sae: SAE, optimizer: Optimizer, clip: float | None) -> None:
    """Move the parameters by their gradients, clipped to the norm `clip` over all of them where it is given.

    Of the gradients nothing can be said afterwards.
    """
    kernels = backend_for(sae.W_dec).fused
    # A crosscoder's rows have another length than the kernels restore.
    if kernels is not None and is_fused_adam(optimizer) and sae.site_widths is None:
        fused_update(sae, optimizer, clip, kernels)
        return
    if sae.unit_rows:
        project_gradient_(sae.W_dec, sae.site_widths)
    # The order matters: the part that the projection removes would else count in the clipped norm and shrink all other
    # gradients, and Adam would gather moments of steps that the renormalisation undoes.
    if clip is not None:
        _clip_(sae, clip)
    optimizer.step()
    if sae.unit_rows:
        renormalise_(sae.W_dec, sae.site_widths)


def _clip_(sae: SAE, clip: float) -> None:
    """Scale all gradients down where their norm, of a split dictionary over all its processes, is above `clip`."""
    if sae.split.size == 1:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), clip)
        return
    own, replicated = sae.b_dec.new_zeros(()), sae.b_dec.new_zeros(())
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None
        # What every process has alike counts once.
        total = replicated if name in sae.replicated else own
        total += parameter.grad.square().sum()
    norm = (sae.split.sum_(own) + replicated).sqrt()
    factor = (clip / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
    for parameter in sae.parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(factor)


class WeightEMA(nn.Module):
    """The bias-corrected exponential mean of an SAE's parameters over the steps (Gao et al. 2406.04093, A.3).

    m_n = sum_i (1 - decay) decay^(n - i) w_i / (1 - decay^n), w_i after step i; what an SAE ships with where it is
    asked for. Unit rows of W_dec are brought to unit length in what ships, which the mean of unit rows is not.
    Buffers hold m_n by the parameters' names.
    """

    def __init__(self, sae: SAE, decay: float) -> None:
        super().__init__()
        self.decay, self.unit_rows = decay, sae.unit_rows
        for name, parameter in sae.named_parameters():
            self.register_buffer(name, torch.zeros_like(parameter, requires_grad=False))

    def gain(self, steps: int) -> float:
        """Compute what the mean moves by after so many steps, 1 or more."""
        # m_n = m_(n-1) + gain (w_n - m_(n-1)) is the formula above by recursion: 1 at the first step, 1 - decay in the
        # long run.
        return (1 - self.decay) / (1 - self.decay**steps)

    @torch.no_grad()
    def update(self, sae: SAE, gain: float | Tensor) -> None:
        """Take in the parameters after a step, by its `gain`."""
        for mean, parameter in zip(self.buffers(), sae.parameters(), strict=True):
            mean.lerp_(parameter, gain)

    @torch.no_grad()
    def copy_to(self, sae: SAE) -> None:
        """Put the mean in the place of the parameters, for good."""
        for mean, parameter in zip(self.buffers(), sae.parameters(), strict=True):
            parameter.copy_(mean)
        if self.unit_rows:
            renormalise_(sae.W_dec, sae.site_widths)

    @contextmanager
    def swapped_in(self, sae: SAE) -> Iterator[None]:
        """Put the mean in the parameters' place for the `with` block."""
        # The optimizer goes on from the raw weights, whose storage must stay the same: they are copied back, not
        # replaced.
        kept = [parameter.detach().clone() for parameter in sae.parameters()]
        self.copy_to(sae)
        try:
            yield
        finally:
            with torch.no_grad():
                for own, parameter in zip(kept, sae.parameters(), strict=True):
                    parameter.copy_(own)
