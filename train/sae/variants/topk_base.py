"""What TopK, BatchTopK and Matryoshka share: the loss that revives dead latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from train.sae.base import SAE
from train.sae.config import AuxKConfig
from train.sae.parts.auxk import auxk_error, auxk_rule, auxk_size
from train.sae.parts.dense import largest_of_each_token
from train.sae.parts.groups import ALONE, RankGroup
from train.sae.sparse.backend import backend_for
from train.sae.sparse.codes import Codes
from train.sae.sparse.error import squared_error
from train.sae.sparse.rules import Rule, Selection
from train.sae.step import TrainContext

_LEAST_OF_SQUARE = 0.1  # of the residual's mean square: what AuxK's norm is at least
_LEAST_OF_VARIANCE = 1e-3  # of Vx, likewise


@dataclass(frozen=True, eq=False)
class Candidates:
    """The latents that AuxK may take."""

    codes: Codes
    """Their z: all, or the largest of each token."""
    latents_d: Int[Tensor, " d"]
    """Which they are, ascending."""
    alive_d: Bool[Tensor, " d"] | None
    """Those of them that are not dead; None where all are."""


class Reconstructed(NamedTuple):
    """What comes of a reconstruction: the variant's own term of the loss, and x_hat'."""

    term: Float[Tensor, ""]
    """The term, differentiable."""
    nmse: Float[Tensor, ""]
    """The NMSE of all latents together."""
    xn_hat_BE: Float[Tensor, "B E"]
    """x_hat' of all latents together; detached where one pass computes error and gradients."""
    W_aside_dE: Float[Tensor, "d E"] | None = None
    """The rows of W_dec that AuxK may take, where their gradient is added to that of the term."""


class TopKBase(SAE):
    """k latents a token (or k * B a batch), and AuxK (Gao et al. 2406.04093, A.2).

    AuxK = alpha * E over tokens of ||r - a W_dec||^2 / norm, r the detached residual and a the k_aux largest z of each
    token among the dead latents, ties to the lowest index. `norm` is the residual's own variance over the batch.
    """

    uses_auxk = True
    fixed_shapes = True
    config: AuxKConfig

    @property
    def k_aux(self) -> int:
        """Return how many latents of a token AuxK takes."""
        return auxk_size(self.d_out) if self.config.auxk_k is None else self.config.auxk_k

    def encode_with_candidates(
        self, xn_BD: Float[Tensor, "B D"], rule: Rule, context: TrainContext
    ) -> tuple[Codes, Candidates | None]:
        """Compute the z that `rule` keeps, and those of the latents that AuxK may take, where there are any."""
        dead_F, latents_d = context.dead_F, context.may_die_d
        alive_d = None
        if dead_F is None or not self.config.auxk_alpha:
            latents_d = None
        elif latents_d is None:
            latents_d = dead_F.nonzero().squeeze(1)
        else:
            alive_d = ~dead_F.index_select(0, latents_d)
        if latents_d is None or not len(latents_d):
            (codes,) = self.select(xn_BD, self.bias_F, [Selection(rule)])
            # Without a dead latent here other processes may have some, whose choice and sum take part of all.
            none = None if latents_d is None or self.split.size == 1 else self._no_candidates(xn_BD, latents_d)
            return codes, none
        # With few dead latents a dense product over them is cheaper than a selection, and gives the same sum.
        few = len(latents_d) <= backend_for(xn_BD).dense_dead * self.k_aux
        aside = Selection(auxk_rule(self.k_aux, few), latents_d, alive_d)
        codes, beside = self.select(xn_BD, self.bias_F, [Selection(rule), aside])
        return codes, Candidates(beside, latents_d, alive_d)

    @staticmethod
    def _no_candidates(xn_BD: Tensor, latents_d: Tensor) -> Candidates:
        none_Bd = xn_BD.new_zeros(len(xn_BD), 0)
        return Candidates(Codes(none_Bd, None, (len(xn_BD), 0)), latents_d, None)

    def reconstruct(
        self,
        codes: Codes,
        xn_BD: Float[Tensor, "B D"],
        target_BE: Float[Tensor, "B E"],
        candidates: Candidates | None = None,
    ) -> Reconstructed:
        """Reconstruct by codes, whose values are f; the sum over prefixes of their NMSE is the term.

        In one pass over the rows of W_dec that they name, where the backend has a kernel for it.
        """
        support = codes.support
        if support is None or support.backend.fused is None or self.split.size > 1:
            return self.reconstruct_plainly(codes, xn_BD, target_BE)
        latents_d = None if candidates is None else candidates.latents_d
        base, bounds = self.beside_latents(xn_BD), self.prefix_sizes
        found = squared_error(codes.values, self.W_dec, base, target_BE, support, bounds=bounds, latents_d=latents_d)
        term = self.nmse_of(found.total, len(xn_BD))
        nmse = term if len(bounds) == 1 else self.nmse_of(found.last_B.sum(), len(xn_BD))
        return Reconstructed(term, nmse, found.error_BE + target_BE, found.rows_dE)

    @property
    def prefix_sizes(self) -> list[int]:
        """Return how many of the latents here each of the prefixes that reconstruct by themselves has: all in one."""
        return [self.own_width]

    def reconstruct_plainly(
        self, codes: Codes, xn_BD: Float[Tensor, "B D"], target_BE: Float[Tensor, "B E"]
    ) -> Reconstructed:
        """Do the same by torch's own operations and the backend's products, differentiably."""
        xn_hat_BE = self.decode_sparse(codes, codes.values, xn_BD)
        nmse = self.nmse(xn_hat_BE, target_BE)
        return Reconstructed(nmse, nmse, xn_hat_BE)

    def auxk(
        self,
        candidates: Candidates | None,
        target_BE: Float[Tensor, "B E"],
        found: Reconstructed,
        data: RankGroup = ALONE,
    ) -> Float[Tensor, ""]:
        """Compute AuxK's term of the loss, of what a reconstruction leaves of its target, of each process of `data`."""
        if candidates is None:
            return target_BE.new_zeros(())
        residual_BD = target_BE - found.xn_hat_BE.detach()
        alive_d, latents_d = candidates.alive_d, candidates.latents_d
        error = auxk_error(
            candidates.codes,
            residual_BD,
            self.W_dec.index_select(0, latents_d) if found.W_aside_dE is None else found.W_aside_dE,
            k=self.k_aux,
            relu=self.config.auxk_relu,
            alive_d=alive_d,
            split=self.split,
            latents_d=latents_d,
        )
        if alive_d is not None or self.split.size > 1:
            # The list of who may die may hold nobody dead yet. Without any dead latent the term is absent, not the norm
            # of the residual.
            dead = latents_d.new_tensor(len(latents_d)) if alive_d is None else (~alive_d).sum()
            error = torch.where(self.split.sum_(dead) == 0, 0.0, error)
        return self.config.auxk_alpha * error / self.auxk_norm(residual_BD, data)

    def auxk_norm(self, residual_BD: Float[Tensor, "B D"], data: RankGroup = ALONE) -> Float[Tensor, ""]:
        """Compute what divides AuxK's squared error: by default the variance of the residual over the batch.

        A batch of one token, or of equal ones, has none, and one that is reconstructed exactly hardly any: there it is
        a tenth of the residual's mean square, and never below a thousandth of Vx.
        """
        if self.config.auxk_norm == "variance":
            return self.variance
        mean_D = data.mean(residual_BD.mean(0))
        spread = data.mean((residual_BD - mean_D).square().sum() / residual_BD.shape[0])
        mean_sq = data.mean(residual_BD.square().sum() / residual_BD.shape[0])
        return torch.maximum(spread, torch.maximum(_LEAST_OF_SQUARE * mean_sq, _LEAST_OF_VARIANCE * self.variance))

    def dense_auxk(
        self, z_BF: Float[Tensor, "B F"], residual_BD: Float[Tensor, "B D"], context: TrainContext
    ) -> Float[Tensor, ""]:
        """Compute AuxK as the formula reads: of all z, with those of living latents out of reach."""
        dead_F = context.dead_F
        if dead_F is None or not bool(dead_F.any()):
            return residual_BD.new_zeros(())
        # `& dead_F`, as with fewer dead latents than k_aux the choice would reach for living ones, whose -inf comes
        # next.
        kept_BF = largest_of_each_token(z_BF.masked_fill(~dead_F, -torch.inf), self.k_aux) & dead_F
        a_BF = torch.where(kept_BF, z_BF.relu() if self.config.auxk_relu else z_BF, 0.0)
        error = (a_BF @ self.W_dec - residual_BD).square().sum(1).mean()
        return self.config.auxk_alpha * error / self.auxk_norm(residual_BD)
