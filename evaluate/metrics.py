"""What is measured of an SAE: sums in float64 that stream over batches, ratios taken once at the end.

Letters: B contexts of a batch, T tokens of a context, N kept tokens of the batch, P predicted tokens of the batch,
S sequences of the whole set, D model width, F latents, V vocabulary.
Every quantity is first a sum for each sequence (a "column" [S]), so that the ratios of pooled sums and their bootstrap
over sequences come from one table. Memory grows with S by a few numbers a sequence, never with tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

Columns = dict[str, NDArray[np.float64]]

TOKEN_EPS = 1e-5  # beside the standard deviation of a token's entries, as `input_norm: token` has it
LOGITS_AT_ONCE = 1 << 24  # entries of the KL's float32 terms held at a time: 64 MB


def double(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where the device (Apple's) has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


class Reconstruction:
    """Squared errors, cosine and gamma of a reconstruction, summed in float64 for each sequence.

    NMSE = sum ||x - x_hat||^2 / sum ||x - mean x||^2, the mean over the whole set. `centre_D` only shifts the sums, so
    that a large constant part of x loses no digits; any value gives the same result.
    """

    def __init__(self, centre_D: Float[Tensor, " D"], sequences: int) -> None:
        self.centre_D = centre_D
        self.columns = {name: torch.zeros(sequences, dtype=torch.float64) for name in self.NAMES}
        self.sum_D = torch.zeros(len(centre_D), dtype=torch.float64)
        self.sum_token_D = torch.zeros(len(centre_D), dtype=torch.float64)

    NAMES = (
        "tokens",
        "error",
        "deviation",
        "error_token",
        "deviation_token",
        "cosine",
        "norm",
        "dot",
        "norm_c",
        "dot_c",
    )

    def update(
        self,
        x_ND: Float[Tensor, "N D"],
        x_hat_ND: Float[Tensor, "N D"],
        empty_ND: Float[Tensor, "N D"],
        sequence_N: Int64[Tensor, " N"],
    ) -> None:
        """Add a batch in model units.

        `empty_ND` is what the decoder gives with no latent active (b_dec), `sequence_N` in [0, S) the token's context.
        """
        x, x_hat, empty = double(x_ND), double(x_hat_ND), double(empty_ND)
        moved = x - double(self.centre_D).to(x.device)
        error_N = (x - x_hat).square().sum(1)
        # Both go to the token-normalised space by x's own mean and scale, so an error there is divided by the scale.
        scale_N = x.std(1) + TOKEN_EPS
        normalised = (x - x.mean(1, keepdim=True)) / scale_N[:, None]
        x_c, x_hat_c = x - empty, x_hat - empty
        norms = x.norm(dim=1) * x_hat.norm(dim=1)
        dot = (x * x_hat).sum(1)
        self.sum_D += moved.sum(0).cpu()
        self.sum_token_D += normalised.sum(0).cpu()
        values = (
            torch.ones_like(error_N),
            error_N,
            moved.square().sum(1),
            error_N / scale_N.square(),
            normalised.square().sum(1),
            torch.where(norms > 0, dot / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0),
            x_hat.square().sum(1),
            dot,
            x_hat_c.square().sum(1),
            (x_hat_c * x_c).sum(1),
        )
        for name, value_N in zip(self.NAMES, values, strict=True):
            self.columns[name].index_add_(0, sequence_N.cpu(), value_N.cpu())

    def table(self) -> Columns:
        """The columns; deviations are about the mean of the whole set, each sequence bearing its share by tokens."""
        columns = {name: value.numpy().copy() for name, value in self.columns.items()}
        tokens = columns["tokens"]
        total = tokens.sum()
        for name, sum_D in (("deviation", self.sum_D), ("deviation_token", self.sum_token_D)):
            columns[name] -= tokens * float((sum_D / total).square().sum())
        columns["error_btk"] = columns["error_token"] / len(self.centre_D)
        return columns


class Firing:
    """How many latents fire on a token (L0), where in the context, and how often each fires; whole numbers, exact."""

    def __init__(self, width: int, context: int, sequences: int) -> None:
        self.histogram = torch.zeros(width + 1, dtype=torch.int64)
        self.fired_F = torch.zeros(width, dtype=torch.int64)
        self.by_position_T = torch.zeros(context, dtype=torch.int64)
        self.tokens_T = torch.zeros(context, dtype=torch.int64)
        self.l0 = torch.zeros(sequences, dtype=torch.float64)

    def update(
        self, f_NF: Float[Tensor, "N F"], sequence_N: Int64[Tensor, " N"], position_N: Int64[Tensor, " N"]
    ) -> None:
        """Add a batch of activations; a latent fires where its activation is above 0."""
        fires_NF = f_NF > 0
        l0_N = fires_NF.sum(1).cpu()
        position_N = position_N.cpu()
        self.fired_F += fires_NF.sum(0).cpu()
        self.histogram += torch.bincount(l0_N, minlength=len(self.histogram))
        self.by_position_T.index_add_(0, position_N, l0_N)
        self.tokens_T.index_add_(0, position_N, torch.ones_like(l0_N))
        self.l0.index_add_(0, sequence_N.cpu(), l0_N.double())

    def std(self) -> float:
        """The standard deviation of L0 over the tokens of the set."""
        count = self.histogram.double()
        l0 = torch.arange(len(count), dtype=torch.float64)
        mean = (l0 * count).sum() / count.sum()
        return float((((l0 - mean).square() * count).sum() / count.sum()).sqrt())

    def result(self) -> dict[str, Any]:
        """std and histogram of L0 (up to the largest met), its mean by position (None where no token is), each latent's
        count of tokens, and how many latents have none."""
        largest = int(self.histogram.nonzero().max())
        by_position = [
            total / count if count else None
            for total, count in zip(self.by_position_T.tolist(), self.tokens_T.tolist(), strict=True)
        ]
        return {
            "std": self.std(),
            "histogram": self.histogram[: largest + 1].tolist(),
            "by_position": by_position,
            "fired": self.fired_F.tolist(),
            "silent": int((self.fired_F == 0).sum()),
        }


def scored_positions(keep_BT: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T-1"]:
    """Position t is scored on token t+1, for every kept token that is not the first of its context."""
    return keep_BT[:, 1:]


@dataclass(frozen=True)
class Predictions:
    """The next-token distributions of one forward at the P scored positions."""

    logp_PV: Float[Tensor, "P V"]
    ce_P: Float[Tensor, " P"]

    @classmethod
    def of(
        cls, logits_BTV: Float[Tensor, "B T V"], ids_BT: Int64[Tensor, "B T"], scored: Bool[Tensor, "B T-1"]
    ) -> Predictions:
        """Cross-entropy in nats of each scored token, from logits of any float type, in float32 at least."""
        logits_PV = logits_BTV[:, :-1][scored]
        logits_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
        logp_PV = logits_PV.log_softmax(-1)
        return cls(logp_PV, -logp_PV.gather(1, ids_BT[:, 1:][scored][:, None])[:, 0])

    def kl_to(self, other: Predictions) -> Float[Tensor, " P"]:
        """KL(self || other) in nats at each position."""
        rows = max(1, LOGITS_AT_ONCE // self.logp_PV.shape[1])
        pairs = zip(torch.split(self.logp_PV, rows), torch.split(other.logp_PV, rows), strict=True)
        return torch.cat([(p.exp() * (p - q)).sum(1) for p, q in pairs])


def totals(columns: Columns) -> Columns:
    """The sum of each column over the whole set, as arrays of one entry."""
    return {name: column.sum(keepdims=True) for name, column in columns.items()}


def statistics(sums: Columns) -> Columns:
    """Every pooled ratio, from sums over sequences: arrays of one entry, or of one for each bootstrap sample."""
    s = sums
    tokens, predicted = s["tokens"], s["predicted"]
    ce = {name: s[name] / predicted for name in ("clean", "spliced", "zero", "mean")}
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # an SAE that gives 0 has no gamma; an ablation may cost nothing
        return {
            "nmse": s["error"] / s["deviation"],
            "ev": 1 - s["error"] / s["deviation"],
            "nmse_token": s["error_token"] / s["deviation_token"],
            "nmse_btk": s["error_btk"] / tokens,
            "l0": s["l0"] / tokens,
            "cosine": s["cosine"] / tokens,
            "gamma": s["norm"] / s["dot"],
            "gamma_c": s["norm_c"] / s["dot_c"],
            "ce_clean": ce["clean"],
            "ce_spliced": ce["spliced"],
            "ce_zero": ce["zero"],
            "ce_mean": ce["mean"],
            "ce_increase": ce["spliced"] - ce["clean"],
            "recovered_zero": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
            "recovered_mean": (ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]),
            "kl": s["kl"] / predicted,
        }


def resampled(columns: Columns, *, samples: int, seed: int) -> Columns:
    """Sums of each column over `samples` draws of S sequences with replacement; the same draws for all columns (paired)
    and, with the same S and seed, for all SAEs."""
    names = list(columns)
    table = np.stack([columns[name] for name in names], axis=1)
    rng = np.random.default_rng(seed)
    sequences = len(table)
    sums = np.empty((samples, len(names)))
    for i in range(samples):
        sums[i] = np.bincount(rng.integers(sequences, size=sequences), minlength=sequences) @ table
    return {name: sums[:, i] for i, name in enumerate(names)}


def pooled(columns: Columns, *, samples: int, seed: int) -> dict[str, dict[str, float | None]]:
    """Every statistic of the whole set with its standard error by the paired bootstrap over sequences.

    None stands for a value that is not finite, and for the error of fewer than two sequences or samples.
    """
    values = statistics(totals(columns))
    drawn = statistics(resampled(columns, samples=samples, seed=seed))
    several = min(samples, len(columns["tokens"])) > 1
    result: dict[str, dict[str, float | None]] = {}
    for name, (value,) in values.items():
        known = several and bool(np.isfinite(drawn[name]).all())
        result[name] = {
            "value": float(value) if np.isfinite(value) else None,
            "se": float(np.std(drawn[name], ddof=1)) if known else None,
        }
    return result


def deltas(columns: Columns, baseline: Columns, *, samples: int, seed: int) -> dict[str, dict[str, float | None]]:
    """Every statistic minus the baseline's, with its standard error and 95% percentile interval by the paired bootstrap
    (each sample draws the same sequences for both). None stands for what is not finite.

    `columns` and `baseline` must be of the same sequences in the same order.
    """
    assert np.array_equal(columns["tokens"], baseline["tokens"])
    one, other = (statistics(totals(each)) for each in (columns, baseline))
    drawn, drawn_other = (statistics(resampled(each, samples=samples, seed=seed)) for each in (columns, baseline))
    result: dict[str, dict[str, float | None]] = {}
    for name in one:
        value, draws = float(one[name][0] - other[name][0]), drawn[name] - drawn_other[name]
        known = min(samples, len(columns["tokens"])) > 1 and bool(np.isfinite(draws).all())
        low, high = np.percentile(draws, [2.5, 97.5]) if known else (None, None)
        result[name] = {
            "value": value if np.isfinite(value) else None,
            "se": float(np.std(draws, ddof=1)) if known else None,
            "low": None if low is None else float(low),
            "high": None if high is None else float(high),
        }
    return result
