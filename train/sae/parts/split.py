"""A dictionary split over processes: which latents each holds, and the choice of a token's largest over all of them.

Letters: B tokens, F latents of the whole dictionary, d latents here, n entries here, k entries a token, R processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from train.sae.parts.groups import RankGroup
from train.sae.sparse.backend import backend_for
from train.sae.sparse.codes import Codes


@dataclass(frozen=True, eq=False)
class LatentSplit(RankGroup):
    """The processes that hold one dictionary together: process r has the latents f = r mod R, in ascending order.

    Dealt out so, every prefix of the dictionary and every age of latents is spread evenly over them.
    """

    def own(self, width: int) -> int:
        """Count the latents here among the first `width` of the dictionary."""
        return len(range(self.rank, width, self.size))

    def latent(self, own_n: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Give the numbers in the whole dictionary of latents numbered as they are here."""
        return own_n if self.size == 1 else own_n * self.size + self.rank

    def part(self, whole_F: Shaped[Tensor, "F ..."]) -> Shaped[Tensor, "d ..."]:
        """Give the rows of the latents that are here, of those of the whole dictionary."""
        return whole_F[self.rank :: self.size]

    def join(self, own_dX: Shaped[Tensor, "d ..."], width: int) -> Shaped[Tensor, "F ..."]:
        """Gather the rows of all latents of a dictionary (or a piece of one) of so many, from all processes."""
        if self.size == 1:
            return own_dX
        most = -(-width // self.size)
        padded = own_dX.new_zeros(most, *own_dX.shape[1:])
        padded[: len(own_dX)] = own_dX
        # [R, i, ...] to [i, R, ...]: latent f is the f // R-th of process f mod R.
        return self.gather(padded).transpose(0, 1).reshape(most * self.size, *own_dX.shape[1:])[:width]

    def top_of_tokens(self, codes: Codes, k: int, latents_d: Int[Tensor, " d"] | None = None) -> Bool[Tensor, ...]:
        """Mark which of the codes' values are among the k largest of their token over all processes.

        Ties go to the lowest latent. The codes hold at least the k largest of each token here, or all. `latents_d` are
        the numbers here of the latents that the codes count from 0. Every process sends its k largest of each token,
        values and numbers: 8 k bytes a token in float32.
        """
        values = codes.values.detach()
        best_Bk, latent_Bk = self._best(codes, values, k, latents_d)
        rows = codes.shape[0]
        best_BM = self.gather(best_Bk).transpose(0, 1).reshape(rows, -1)
        latent_BM = self.gather(latent_Bk).transpose(0, 1).reshape(rows, -1)
        smallest_B1 = best_BM.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        # Of the ties at the smallest so many belong to the choice as the larger ones leave room for.
        room_B1 = k - (best_BM > smallest_B1).sum(1, keepdim=True)
        ties_BM = torch.where(best_BM == smallest_B1, latent_BM, torch.iinfo(latent_BM.dtype).max).sort(1).values
        last_B1 = ties_BM.gather(1, (room_B1 - 1).clamp(0, ties_BM.shape[1] - 1))
        if codes.support is None:
            smallest, last = smallest_B1, last_B1
            own = torch.arange(codes.shape[1], device=values.device)
        else:
            rows_n = codes.support.rows_n
            smallest, last = smallest_B1[:, 0][rows_n], last_B1[:, 0][rows_n]
            own = codes.support.latents_n
        latent = self.latent(own if latents_d is None else latents_d[own])
        return (values > smallest) | ((values == smallest) & (latent <= last)) | values.isnan()

    def _best(
        self, codes: Codes, values: Tensor, k: int, latents_d: Tensor | None
    ) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"]]:
        """Give the k largest of each token here and their latents' numbers, filled up with -inf."""
        rows = codes.shape[0]
        if codes.support is None:
            own_best, own = _best_of_rows(values, k)
        elif codes.support.backend.fixed_sizes:  # equally many of each token
            own_best, own = values.view(rows, -1), codes.support.latents_n.view(rows, -1)
        else:
            rows_n, starts_B = codes.support.rows_n, codes.support.row_ends[:-1]
            place_n = torch.arange(len(rows_n), device=values.device) - starts_B[rows_n]
            own_best = values.new_full((rows, k), -torch.inf)
            own_best[rows_n, place_n] = values
            own = torch.zeros((rows, k), dtype=torch.int64, device=values.device)
            own[rows_n, place_n] = codes.support.latents_n
        latent = self.latent(own if latents_d is None or not len(latents_d) else latents_d[own]).to(torch.int32)
        missing = k - own_best.shape[1]
        if missing > 0:
            own_best = torch.nn.functional.pad(own_best, (0, missing), value=-torch.inf)
            latent = torch.nn.functional.pad(latent, (0, missing))
        return own_best, latent


def _best_of_rows(z_Bd: Float[Tensor, "B d"], k: int) -> tuple[Float[Tensor, "B c"], Int[Tensor, "B c"]]:
    """Give the k largest of each row, or all, with their places; ties to the lowest place."""
    if k >= z_Bd.shape[1]:
        return z_Bd, torch.arange(z_Bd.shape[1], device=z_Bd.device).expand_as(z_Bd)
    # topk says nothing of ties: it gets a row in which no others than the chosen ones are left.
    chosen_Bd = torch.where(backend_for(z_Bd).mark_largest(z_Bd, k).bool(), z_Bd, -torch.inf)
    best = chosen_Bd.topk(k, dim=1)
    return best.values, best.indices


WHOLE = LatentSplit()
"""One process that holds all latents."""
