"""How well an SAE reconstructs and how sparsely it fires: sums over tokens that validation and evaluation share.

Letters: N tokens of a batch, G groups of tokens (contexts, or all as one), D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from train.sae.base import SAE
from train.sae.parts.groups import ALONE, RankGroup
from train.sae.parts.sites import SiteNorms
from train.sae.sparse.codes import Codes
from train.sae.step import Batch

ONE_L0 = 1.05  # SAEs whose L0 differ by less than this factor are compared as of one L0


def one_l0_groups(l0s: Sequence[float]) -> list[list[int]]:
    """Group SAEs, given by their L0, into those of about one L0, from the sparsest on.

    A group begins with the sparsest SAE not yet in one and takes in all whose L0 is at most ONE_L0 times that.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(l0s)), key=lambda i: (l0s[i], i)):
        if groups and l0s[index] <= ONE_L0 * l0s[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def to_float64(x: Tensor) -> Tensor:
    """Convert to float64, on the CPU where the device has none (Apple's)."""
    return x.to("cpu" if x.device.type == "mps" else x.device).double()


class ReconstructionSums:
    """Sums of squared errors over tokens, in float64, for each group of tokens.

    NMSE = sum ||x - x_hat||^2 / sum ||x - mean x||^2, the mean over the whole set: a ratio of sums, never a mean of
    ratios. `centre_D` only shifts the sums, so that a large constant part of x loses no digits.
    """

    NAMES = ("tokens", "error", "deviation")

    def __init__(self, centre_D: Float[Tensor, " D"], groups: int = 1) -> None:
        self.centre_D = to_float64(centre_D)
        device = self.centre_D.device
        self.columns = {name: torch.zeros(groups, dtype=torch.float64, device=device) for name in self.NAMES}
        self.sum_D = torch.zeros_like(self.centre_D)

    def add(
        self, x_ND: Float[Tensor, "N D"], x_hat_ND: Float[Tensor, "N D"], group_N: Int64[Tensor, " N"] | None = None
    ) -> Float64[Tensor, " N"]:
        """Add a batch in model units and give each token's squared error; `group_N` None is one group."""
        x, x_hat = to_float64(x_ND), to_float64(x_hat_ND)
        moved = x - self.centre_D.to(x.device)
        error_N = (x - x_hat).square().sum(1)
        self.sum_D += moved.sum(0).to(self.sum_D.device)
        for name, value_N in zip(self.NAMES, (torch.ones_like(error_N), error_N, moved.square().sum(1)), strict=True):
            _add(self.columns[name], value_N, group_N)
        return error_N

    def table(self) -> dict[str, Float64[Tensor, " G"]]:
        """Give the columns, deviations about the mean of the whole set, each group bearing its share by tokens."""
        tokens = self.columns["tokens"]
        shift = (self.sum_D / tokens.sum()).square().sum()
        return self.columns | {"deviation": self.columns["deviation"] - tokens * shift}

    def nmse(self) -> float:
        """Give the NMSE of the set (= FVU)."""
        table = self.table()
        return float(table["error"].sum() / table["deviation"].sum())

    def all_reduce(self, ranks: RankGroup) -> None:
        """Add up the sums of all ranks."""
        for tensor in (*self.columns.values(), self.sum_D):
            ranks.sum_(tensor)


class FiringSums:
    """How many latents fire on a token (L0) and how often each fires: whole numbers for each group of tokens."""

    def __init__(self, width: int, groups: int = 1, device: torch.device | None = None) -> None:
        self.tokens = torch.zeros(groups, dtype=torch.int64, device=device)
        self.l0 = torch.zeros(groups, dtype=torch.int64, device=device)
        self.fired_F = torch.zeros(width, dtype=torch.int64, device=device)

    def add(self, f_NF: Float[Tensor, "N F"], group_N: Int64[Tensor, " N"] | None = None) -> Int64[Tensor, " N"]:
        """Add a batch of activations and give each token's L0; a latent fires where its activation is above 0."""
        fires_NF = f_NF > 0
        l0_N = fires_NF.sum(1)
        self.fired_F += fires_NF.sum(0).to(self.fired_F.device)
        _add(self.l0, l0_N, group_N)
        _add(self.tokens, torch.ones_like(l0_N), group_N)
        return l0_N

    def add_codes(self, codes: Codes, f: Tensor) -> None:
        """Add a batch of one group by its codes and their f, which need no matrix."""
        if codes.support is None:
            self.add(f)
            return
        fires_n = f > 0
        self.fired_F.index_add_(0, codes.support.latents_n.to(self.fired_F.device), fires_n.long())
        _add(self.l0, fires_n.sum(), None)
        self.tokens += codes.shape[0]

    def mean_l0(self) -> float:
        """Give the mean L0 over the tokens of the set."""
        return int(self.l0.sum()) / int(self.tokens.sum())

    def silent(self) -> int:
        """Count the latents that fire on no token of the set."""
        return int((self.fired_F == 0).sum())

    def all_reduce(self, ranks: RankGroup) -> None:
        """Add up the sums of all ranks."""
        for tensor in (self.tokens, self.l0, self.fired_F):
            ranks.sum_(tensor)


def _add(column: Tensor, value_N: Tensor, group_N: Tensor | None) -> None:
    value_N = value_N.to(column.device)
    if group_N is None:
        column += value_N.sum()
    else:
        column.index_add_(0, group_N.to(column.device), value_N)


@torch.no_grad()
def held_out(
    saes: Sequence[SAE], batches: Iterable[Batch], device: torch.device, data: RankGroup = ALONE
) -> list[dict[str, float]]:
    """Score the inference form of each SAE on all ranks' `batches` in model units, which are read once for all.

    A transcoder's NMSE is that of its target, a crosscoder's is over its sites with each in its normalised units. Each
    process of `data` has batches of its own; those of a split dictionary have the same ones.
    """
    errors = [ReconstructionSums(torch.zeros(sae.d_out, device=device)) for sae in saes]
    firings = [FiringSums(sae.own_width, device=device) for sae in saes]
    modes = [sae.training for sae in saes]
    for sae in saes:
        sae.eval()  # the inference form rounds no factors of the encoder's product
    for x_BD, target_BE in batches:
        for sae, error, firing in zip(saes, errors, firings, strict=True):
            codes, f, x_hat_BE = sae.encode_decode_sparse(x_BD)
            x_BE = x_BD if target_BE is None else target_BE
            if isinstance(sae.norm, SiteNorms):
                x_BE, x_hat_BE = sae.norm.weighed(x_BE), sae.norm.weighed(x_hat_BE)
            error.add(x_BE, x_hat_BE)
            firing.add_codes(codes, f)
    for sae, mode in zip(saes, modes, strict=True):
        sae.train(mode)
    found = []
    for sae, error, firing in zip(saes, errors, firings, strict=True):
        error.all_reduce(data)
        firing.all_reduce(data)
        sae.split.sum_(firing.l0)
        silent = int(sae.split.sum_(torch.tensor(firing.silent(), device=device)))
        tokens = int(firing.tokens.sum())
        found.append({"nmse": error.nmse(), "l0": firing.mean_l0(), "silent": silent, "tokens": tokens})
    return found
