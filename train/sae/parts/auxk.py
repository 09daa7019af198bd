"""Dead latents: how long each has been silent, and what revives them: an auxiliary loss, or rising biases."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from train.sae.parts.split import WHOLE, LatentSplit
from train.sae.sparse.backend import backend_for
from train.sae.sparse.codes import Codes
from train.sae.sparse.rules import Everything, TopPerToken

_LONGEST = 50  # steps between two looks at the device
_MULTIPLE = 64  # latents: matrix kernels run at full width, and a selection can look at whole groups


def default_window(tokens: int) -> int:
    """Give the silent tokens after which a latent is dead: the smaller of 10M and a tenth of the run's tokens."""
    return max(1, min(10_000_000, tokens // 10))


class DeadLatents(nn.Module):
    """Tokens since each latent last fired, in the buffer `since_F` (int64). Only the training step calls `update`."""

    since_F: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("since_F", torch.zeros(width, dtype=torch.int64))
        self._may_die_d: Tensor | None = None
        self._left = 0  # steps for which `_may_die_d` holds

    @torch.no_grad()
    def update(self, fired_F: Bool[Tensor, " F"], tokens: int) -> None:
        """Count a batch of `tokens` tokens in which the latents `fired_F` fired."""
        self.since_F.add_(tokens).masked_fill_(fired_F, 0)

    def mask(self, dead_after: int) -> Bool[Tensor, " F"]:
        """Mark the latents silent for at least `dead_after` tokens."""
        return self.since_F >= dead_after

    def may_die(self, dead_after: int, tokens: int, every: int) -> Int[Tensor, " d"] | None:
        """Find latents, ascending, outside of which `mask` marks none, for a step on a GPU; None elsewhere.

        Call it before each step, of at most `tokens` tokens. Asks the device once in `every` steps (1 to 50 of them),
        then for all that can be dead by the last of them. Some that live fill their number up to a multiple of 64,
        where there are any dead and so many latents.
        """
        # A CPU can afford to count the dead in each step, and then takes just those.
        if not backend_for(self.since_F).fixed_sizes:
            return None
        if not self._left:
            every = max(1, min(_LONGEST, every))
            # A latent needs `dead_after` silent tokens. Who may be dead after `every - 1` more steps has been silent
            # for all but those tokens by now, so the list holds for all of them; `alive_d` takes out who is not dead
            # yet.
            self._may_die_d = filled_up(self.mask(dead_after - (every - 1) * tokens))
            self._left = every
        self._left -= 1
        return self._may_die_d


def filled_up(marked_F: Bool[Tensor, " F"]) -> Int[Tensor, " d"]:
    """List the marked latents and, where there are any, the first unmarked ones up to a multiple of 64 in all."""
    marked_d = marked_F.nonzero().squeeze(1)
    missing = min(-len(marked_d) % _MULTIPLE, len(marked_F) - len(marked_d))
    if not missing:
        return marked_d
    return torch.cat([marked_d, (~marked_F).nonzero().squeeze(1)[:missing]]).sort().values


@torch.no_grad()
def raise_biases(biases: Iterable[Float[Tensor, " F"]], dead_F: Bool[Tensor, " F"], by: Float[Tensor, ""]) -> None:
    """Raise the biases of dead latents, after an optimizer's step, where no AuxK revives them.

    A latent that never fires gets no gradient there. Raised in each step it comes back to where it fires on the tokens
    it fits best, and from there on the loss decides. Not in the papers, which resample or leave the dead.
    """
    step_F = dead_F * by
    for bias_F in biases:
        bias_F.add_(step_F)


def auxk_size(d_out: int) -> int:
    """Compute k_aux = 2^round(log2(D / 2)), ties up, D the residual's width (Gao et al. 2024: the power near D / 2)."""
    return int(2 ** max(0, math.floor(math.log2(d_out / 2) + 0.5)))


def auxk_rule(k: int, few: bool) -> TopPerToken | Everything:
    """Choose what AuxK gets of the dead latents' z: all of it where they are few, else the k largest of each token."""
    return Everything() if few else TopPerToken(k, positive=False)


def auxk_error(
    codes: Codes,
    residual_BD: Float[Tensor, "B D"],
    W_dead_dD: Float[Tensor, "d D"],
    *,
    k: int,
    relu: bool,
    alive_d: Bool[Tensor, " d"] | None = None,
    split: LatentSplit = WHOLE,
    latents_d: Int[Tensor, " d"] | None = None,
) -> Float[Tensor, ""]:
    """Compute AuxK's error, E over tokens of ||r - a W_dec||^2, from dead latents' z and decoder rows.

    Gao et al. 2406.04093, A.2. a holds the k = k_aux largest pre-activations z of each token among the dead latents
    (live ones cannot win: they are not looked at) and zero elsewhere; no b_dec. `residual_BD` r = x' - x_hat' must be
    detached. Signed values of a give a gradient where z < 0; `relu` takes relu(a), the reference form, which gives none
    there. `alive_d` marks latents among these d that are not dead. Of a `split` dictionary `latents_d` numbers the
    dead ones of this process; the largest are then chosen, and their reconstructions added up, over all of them.
    """
    assert not residual_BD.requires_grad, "AuxK explains the residual and must not change it"
    a = codes.values
    kept = _chosen(codes, k, alive_d, split, latents_d)
    if kept is not None:
        # Ones multiply z and its gradient, which is faster on a CPU; z of what is no candidate is -inf, and no factor.
        a = torch.where(kept, a, 0.0) if kept.dtype == torch.bool else a * kept
    if relu:
        a = a.relu()
    return (split.total(codes.decode(a, W_dead_dD).squeeze(0)) - residual_BD).square().sum() / len(residual_BD)


@torch.no_grad()
def _chosen(
    codes: Codes, k: int, alive_d: Tensor | None, split: LatentSplit, latents_d: Tensor | None
) -> Tensor | None:
    """Mark which values AuxK takes by 1 or True, of those of dead latents; None for all. The choice passes no gradient.

    All that it needs is of the size of z and is freed with it, before the reconstruction is made.
    """
    z = codes.values.detach()
    living = None if alive_d is None else codes.at(alive_d)
    kept: Tensor | None = None
    if split.size > 1:
        z = z if living is None else z.masked_fill(living, -torch.inf)
        kept = split.top_of_tokens(Codes(z, codes.support, codes.shape), k, latents_d)
    elif codes.support is None and k < z.shape[1]:
        z = z if living is None else z.masked_fill(living, -torch.inf)
        kept = backend_for(z).mark_largest(z, k)
    if living is None:
        return kept
    # Living ones are among the largest where fewer are dead than k_aux.
    return ~living if kept is None else kept.bool() & ~living
