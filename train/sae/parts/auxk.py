"""Dead latents: how long each has been silent, and the auxiliary loss that revives them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from train.sae.sparse import fixed
from train.sae.sparse.encode import Codes
from train.sae.sparse.select import TopOfBatch, TopPerToken

_HELD = 8  # times k_aux: up to so many dead latents dense products are the faster ones
_LONGEST = 50  # steps between two looks at the device
_HELD_ON_GPU = 128  # set for memory, not yet measured


def default_window(tokens: int) -> int:
    """Silent tokens after which a latent is dead: the smaller of 10M training tokens and a tenth of the run."""
    return max(1, min(10_000_000, tokens // 10))


class DeadLatents(nn.Module):
    """Tokens since each latent last fired, in the buffer `since_F` (int64). Only the training step calls `update`."""

    since_F: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("since_F", torch.zeros(width, dtype=torch.int64))
        self._among_d: Tensor | None = None
        self._left = 0  # steps for which `_among_d` holds

    @torch.no_grad()
    def update(self, fired_F: Bool[Tensor, " F"], tokens: int) -> None:
        """Count a batch of `tokens` tokens in which the latents `fired_F` fired."""
        self.since_F.add_(tokens).masked_fill_(fired_F, 0)

    def mask(self, dead_after: int) -> Bool[Tensor, " F"]:
        """Latents silent for at least `dead_after` tokens."""
        return self.since_F >= dead_after

    def among(self, dead_after: int, tokens: int, every: int) -> Int[Tensor, " d"] | None:
        """For a step on a GPU: latents, ascending, outside of which `mask` marks none. None elsewhere: look at `mask`.

        Call it before each step, of at most `tokens` tokens. Asks the device once in `every` steps (1 to 50 of them),
        then for all that can be dead by the last of them.
        """
        if not fixed.wanted(self.since_F):
            return None
        if not self._left:
            every = max(1, min(_LONGEST, every))
            self._among_d = self.mask(dead_after - (every - 1) * tokens).nonzero().squeeze(1)
            self._left = every
        self._left -= 1
        return self._among_d


def auxk_size(d_in: int) -> int:
    """k_aux = 2^round(log2(D / 2)), ties up (Gao et al. 2024: the power of two near D / 2)."""
    return int(2 ** max(0, math.floor(math.log2(d_in / 2) + 0.5)))


def auxk_selector(
    k: int, dead: int, tokens: int | None = None, *, on_gpu: bool = False
) -> TopPerToken | TopOfBatch | None:
    """What picks AuxK's k latents a token among so many dead ones as z passes by; None where all their z may be held.

    `tokens`: of the batch, where they are chosen over it.
    """
    if dead <= (_HELD_ON_GPU if on_gpu else _HELD) * k:
        return None
    return TopPerToken(k, positive=False) if tokens is None else TopOfBatch(k * tokens, positive=False)


def auxk_error(
    codes: Codes,
    residual_BD: Float[Tensor, "B D"],
    W_dead_dD: Float[Tensor, "d D"],
    *,
    k: int,
    relu: bool,
    over_batch: bool = False,
    live_d: Bool[Tensor, " d"] | None = None,
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2406.04093, A.2): E over tokens of ||r - a W_dec||^2 of dead latents' z and decoder rows.

    a holds the k = k_aux largest pre-activations z of each token, or with `over_batch` the k_aux * B largest of the
    batch, among the dead latents (live ones cannot win: they are not looked at) and zero elsewhere; no b_dec.
    `residual_BD` r = x' - x_hat' must be detached. Signed values of a give a gradient where z < 0; `relu` takes
    relu(a), the reference form, which gives none there. `live_d` marks latents among these d that are not dead.
    """
    assert not residual_BD.requires_grad, "AuxK explains the residual and must not change it"
    a = codes.values
    if codes.support is None and k < a.shape[1]:
        z_Bd = a.detach() if live_d is None else a.detach().masked_fill(live_d, -torch.inf)
        lines = z_Bd.view(1, -1) if over_batch else z_Bd
        top = lines.topk(k * len(z_Bd) // len(lines), dim=1, sorted=False).indices
        kept = torch.zeros_like(lines, dtype=torch.bool).scatter_(1, top, True)
        a = torch.where(kept.view_as(a), a, 0.0)
    if live_d is not None:  # taken where fewer are dead than k_aux
        a = torch.where(codes.at(live_d), 0.0, a)
    if relu:
        a = a.relu()
    return (codes.decode(a, W_dead_dD)[0] - residual_BD).square().sum() / len(residual_BD)
