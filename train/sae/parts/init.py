"""What an SAE starts from: directions, the centre of the data, a first scale of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from jaxtyping import Float
from torch import Tensor

from data.base.errors import UserError
from train.sae.parts.norm import InputNorm
from train.sae.parts.split import WHOLE, LatentSplit

SAMPLES = 32_768  # tokens the geometric median is taken over, as in OA
_PIECE = 4096  # rows drawn at a time, a multiple of 16


@dataclass(frozen=True, eq=False)
class StartRows:
    """Rows to start from, in model units, with E||x||^2 and E||x - E x||^2 of all training tokens, where known.

    A crosscoder's rows have its sites side by side, and both moments are those of each site.
    """

    rows_ND: Float[Tensor, "N D"]
    mean_sq_norm: float | Sequence[float] | None = None
    variance: float | Sequence[float] | None = None


def directions(width: int, d_in: int, seed: int, split: LatentSplit = WHOLE) -> Float[Tensor, "F D"]:
    """Draw random unit rows from a generator of their own: the same for every variant at a seed;
    no global state moves.

    Of a split dictionary each process draws all rows, a few thousand at a time, and keeps its own: the numbers are
    those of one process.
    """
    generator = torch.Generator().manual_seed(seed)
    if split.size == 1:
        return nnf.normalize(torch.randn(width, d_in, generator=generator), dim=1)
    own_FD = torch.empty(split.own(width), d_in)
    first = 0
    while first < width:
        # torch draws normal numbers in groups of 16: pieces of whole groups give the numbers of one long draw. What is
        # left at the end is at least a piece, as a rest of less than a group would be drawn in another way.
        rows = _PIECE if width - first >= 2 * _PIECE else width - first
        piece_FD = torch.randn(rows, d_in, generator=generator)
        own_FD[split.own(first) : split.own(first + rows)] = piece_FD[(split.rank - first) % split.size :: split.size]
        first += rows
    return nnf.normalize(own_FD, dim=1)


def geometric_median(
    x_ND: Float[Tensor, "N D"], *, iterations: int = 200, tolerance: float = 1e-6
) -> Float[Tensor, " D"]:
    """Compute argmin_m sum_n ||x_n - m|| by Weiszfeld's iteration,
    until a step is below `tolerance` of the data's spread."""
    median_D = x_ND.mean(0)
    spread = torch.linalg.vector_norm(x_ND - median_D, dim=1).mean()
    if spread == 0:
        return median_D
    floor = torch.finfo(x_ND.dtype).eps * spread  # a sample at the median itself has a bounded weight
    for _ in range(iterations):
        weight_N = torch.linalg.vector_norm(x_ND - median_D, dim=1).clamp_min_(floor).reciprocal_()
        moved_D = (weight_N @ x_ND) / weight_N.sum()
        step = torch.linalg.vector_norm(moved_D - median_D)
        median_D = moved_D
        if step <= tolerance * spread:
            break
    return median_D


def finite(sample_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Return rows to start from; UserError where they are too few or not all finite."""
    if sample_ND.shape[0] < 2 or not bool(sample_ND.isfinite().all()):
        raise UserError("an SAE starts from at least 2 finite activations: check the site and the store")
    return sample_ND


def fit_norm(norm: InputNorm, sample: StartRows) -> list[float]:
    """Set a norm's s, and return the E||x||^2 (model units) that it was set by, of each site."""
    mean_sq_norms = _by_site(sample.mean_sq_norm)
    if mean_sq_norms is None:
        parts = torch.split(sample.rows_ND.double(), list(norm.widths), 1)
        mean_sq_norms = [float(part.square().sum(1).mean()) for part in parts]
    for mean_sq_norm in mean_sq_norms:
        if not 0 < mean_sq_norm < float("inf"):
            raise UserError(
                f"the activations' mean squared norm is {mean_sq_norm}: an SAE needs finite ones that are not all zero"
            )
    norm.fit(*mean_sq_norms)
    return mean_sq_norms


def fit_moments(norm: InputNorm, sample: StartRows) -> tuple[float, float]:
    """Set a norm's s, and return E||x'||^2 and Vx, sums over the sites; UserError where x does not vary."""
    mean_sq_norms, variances = fit_norm(norm, sample), _by_site(sample.variance)
    if norm.kind == "token" or variances is None:
        xn_ND = norm.normalise(sample.rows_ND).double()
        mean_sq, spread = float(xn_ND.square().sum(1).mean()), float(xn_ND.var(0, correction=0).sum())
    else:
        squares = [float(s) ** 2 for s in norm.scale.reshape(-1)]
        mean_sq = sum(s_sq * mean for s_sq, mean in zip(squares, mean_sq_norms, strict=True))
        spread = sum(s_sq * variance for s_sq, variance in zip(squares, variances, strict=True))
    if not 0 < spread < float("inf"):
        raise UserError("the activations do not vary, so there is nothing to reconstruct: check the site and the store")
    return mean_sq, spread


def _by_site(moment: float | Sequence[float] | None) -> list[float] | None:
    if moment is None:
        return None
    return [moment] if isinstance(moment, int | float) else [*moment]
