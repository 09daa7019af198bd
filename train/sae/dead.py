"""Dead latents: how long each has been silent, and the auxiliary loss that revives them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def default_window(tokens: int) -> int:
    """Silent tokens after which a latent is dead: the smaller of 10M training tokens and a tenth of the run."""
    return max(1, min(10_000_000, tokens // 10))


class DeadLatents(nn.Module):
    """Tokens since each latent last fired, in the buffer `since_F` (int64). Only the training step calls `update`."""

    since_F: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("since_F", torch.zeros(width, dtype=torch.int64))

    @torch.no_grad()
    def update(self, fired_F: Bool[Tensor, " F"], tokens: int) -> None:
        """Count a batch of `tokens` tokens in which the latents `fired_F` fired."""
        self.since_F.add_(tokens).masked_fill_(fired_F, 0)

    def mask(self, dead_after: int) -> Bool[Tensor, " F"]:
        """Latents silent for at least `dead_after` tokens."""
        return self.since_F >= dead_after


def auxk_size(d_in: int) -> int:
    """k_aux = 2^round(log2(D / 2)), ties up (Gao et al. 2024: the power of two near D / 2)."""
    return int(2 ** max(0, math.floor(math.log2(d_in / 2) + 0.5)))


def auxk_error(
    z_BF: Float[Tensor, "B F"],
    residual_BD: Float[Tensor, "B D"],
    dead_F: Bool[Tensor, " F"] | None,
    W_dec_FD: Float[Tensor, "F D"],
    *,
    relu: bool,
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2406.04093, A.2): E over tokens of ||r - a W_dec||^2, zero where nothing is dead.

    a holds the k_aux largest pre-activations z of each token among the dead latents (live ones cannot win: they are
    not looked at) and zero elsewhere; no b_dec. `residual_BD` r = x' - x_hat' must be detached. Signed values of a
    give a gradient where z < 0; `relu` takes relu(a), the reference form, which gives none there.
    """
    assert not residual_BD.requires_grad, "AuxK explains the residual and must not change it"
    if dead_F is None:
        return z_BF.new_zeros(())
    index = dead_F.nonzero().squeeze(1)
    k = min(auxk_size(residual_BD.shape[1]), index.numel())
    if k == 0:
        return z_BF.new_zeros(())
    a_Bn = z_BF.index_select(1, index)
    if k < index.numel():
        top_Bk = a_Bn.detach().topk(k, dim=1, sorted=False).indices
        a_Bn = torch.where(torch.zeros_like(a_Bn, dtype=torch.bool).scatter_(1, top_Bk, True), a_Bn, 0.0)
    if relu:
        a_Bn = a_Bn.relu()
    return (a_Bn @ W_dec_FD[index] - residual_BD).square().sum() / z_BF.shape[0]
