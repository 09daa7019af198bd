"""What is measured of an SAE: sums in float64 that stream over batches, ratios taken once at the end.

Letters: B contexts of a batch, T tokens of a context, N kept tokens of the batch, P predicted tokens of the batch,
S contexts of the whole set, D model width, F latents, V vocabulary.
Every quantity is first summed for each context and each document ("columns"). The totals over contexts give the ratios
of pooled sums; the documents are what their bootstrap draws, for tokens of one document are alike. Memory grows by a
few numbers a context and a document, never with tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from train.sae.metrics import to_float64

Columns = dict[str, NDArray[np.float64]]
By = Literal["context", "document"]  # what a column has an entry for

TOKEN_EPS = 1e-5  # beside the standard deviation of a token's entries, as `input_norm: token` has it
LOGITS_AT_ONCE = 1 << 24  # entries of the KL's float32 terms held at a time: 64 MB


class GroupedSums:
    """Sums in float64 of quantities that tokens have, for each context and, apart, for each document."""

    def __init__(self, names: Sequence[str], n_contexts: int, n_documents: int) -> None:
        self.of_contexts = {name: torch.zeros(n_contexts, dtype=torch.float64) for name in names}
        self.of_documents = {name: torch.zeros(n_documents, dtype=torch.float64) for name in names}

    def add(self, name: str, value_N: Tensor, context_N: Tensor, document_N: Tensor) -> None:
        """Add the values of N tokens."""
        value_N = value_N.cpu().double()
        self.of_contexts[name].index_add_(0, context_N.cpu(), value_N)
        self.of_documents[name].index_add_(0, document_N.cpu(), value_N)

    def table(self, by: By) -> Columns:
        """Give the sums as columns, which are copies."""
        sums = self.of_contexts if by == "context" else self.of_documents
        return {name: column.numpy().copy() for name, column in sums.items()}

    def merged(self, other: GroupedSums) -> GroupedSums:
        """Give the sums over the tokens of both."""
        names = list(self.of_contexts)
        both = GroupedSums(names, 0, 0)
        both.of_contexts = {name: self.of_contexts[name] + other.of_contexts[name] for name in names}
        both.of_documents = {name: self.of_documents[name] + other.of_documents[name] for name in names}
        return both


class Reconstruction:
    """Squared errors, cosine and gamma of a reconstruction, summed in float64 for each context and each document.

    NMSE = sum ||x - x_hat||^2 / sum ||x - mean x||^2, the mean over the whole set. `centre_D` only shifts the sums, so
    that a large constant part of x loses no digits; any value gives the same result.
    """

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

    def __init__(self, centre_D: Float[Tensor, " D"], n_contexts: int, n_documents: int | None = None) -> None:
        self.centre_D = centre_D
        self.sums = GroupedSums(self.NAMES, n_contexts, n_contexts if n_documents is None else n_documents)
        self.sum_D = torch.zeros(len(centre_D), dtype=torch.float64)
        self.sum_token_D = torch.zeros(len(centre_D), dtype=torch.float64)

    def update(
        self,
        x_ND: Float[Tensor, "N D"],
        x_hat_ND: Float[Tensor, "N D"],
        empty_ND: Float[Tensor, "N D"],
        context_N: Int64[Tensor, " N"],
        document_N: Int64[Tensor, " N"] | None = None,
    ) -> None:
        """Add a batch in model units.

        `empty_ND` is what the decoder gives with no latent active (b_dec). `context_N` in [0, S) is each token's
        context, `document_N` its document; without it each context is a document.
        """
        x, x_hat, empty = to_float64(x_ND), to_float64(x_hat_ND), to_float64(empty_ND)
        moved = x - to_float64(self.centre_D).to(x.device)
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
            self.sums.add(name, value_N, context_N, context_N if document_N is None else document_N)

    def table(self, by: By = "context") -> Columns:
        """Return the columns; deviations are about the mean of the whole set,
        each group bearing its share by tokens."""
        columns = self.sums.table(by)
        tokens = columns["tokens"]
        total = self.sums.of_contexts["tokens"].numpy().sum()
        for name, sum_D in (("deviation", self.sum_D), ("deviation_token", self.sum_token_D)):
            columns[name] -= tokens * float((sum_D / total).square().sum())
        columns["error_btk"] = columns["error_token"] / len(self.centre_D)
        return columns

    def merged(self, other: Reconstruction) -> Reconstruction:
        """Add the sums over the tokens of both, which have one centre."""
        both = Reconstruction(self.centre_D, 0)
        both.sums = self.sums.merged(other.sums)
        both.sum_D = self.sum_D + other.sum_D
        both.sum_token_D = self.sum_token_D + other.sum_token_D
        return both


class Firing:
    """How many latents fire on a token (L0), where in the context, and how often each fires; whole numbers, exact."""

    def __init__(self, width: int, context: int, n_contexts: int, n_documents: int | None = None) -> None:
        self.histogram = torch.zeros(width + 1, dtype=torch.int64)
        self.fired_F = torch.zeros(width, dtype=torch.int64)
        self.by_position_T = torch.zeros(context, dtype=torch.int64)
        self.tokens_T = torch.zeros(context, dtype=torch.int64)
        self.sums = GroupedSums(("l0",), n_contexts, n_contexts if n_documents is None else n_documents)

    def update(
        self,
        f_NF: Float[Tensor, "N F"],
        context_N: Int64[Tensor, " N"],
        position_N: Int64[Tensor, " N"],
        document_N: Int64[Tensor, " N"] | None = None,
    ) -> None:
        """Add a batch of activations; a latent fires where its activation is above 0."""
        fires_NF = f_NF > 0
        l0_N = fires_NF.sum(1).cpu()
        position_N = position_N.cpu()
        self.fired_F += fires_NF.sum(0).cpu()
        self.histogram += torch.bincount(l0_N, minlength=len(self.histogram))
        self.by_position_T.index_add_(0, position_N, l0_N)
        self.tokens_T.index_add_(0, position_N, torch.ones_like(l0_N))
        self.sums.add("l0", l0_N, context_N, context_N if document_N is None else document_N)

    def std(self) -> float:
        """Return the standard deviation of L0 over the tokens of the set."""
        count = self.histogram.double()
        l0 = torch.arange(len(count), dtype=torch.float64)
        mean = (l0 * count).sum() / count.sum()
        return float((((l0 - mean).square() * count).sum() / count.sum()).sqrt())

    def result(self) -> dict[str, Any]:
        """Return std and histogram of L0 (up to the largest met), its mean by position (None where no token is), each
        latent's count of tokens, and how many latents have none."""
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
    """Mark the positions t that are scored on token t+1:
    those of every kept token that is not the first of its context."""
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
        """Compute the cross-entropy in nats of each scored token,
        from logits of any float type, in float32 at least."""
        return cls.of_rows(logits_BTV[:, :-1][scored], ids_BT[:, 1:][scored])

    @classmethod
    def of_rows(cls, logits_PV: Float[Tensor, "P V"], next_P: Int64[Tensor, " P"]) -> Predictions:
        """Compute the same of the logits at the scored positions and the token that follows each."""
        logits_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
        logp_PV = logits_PV.log_softmax(-1)
        return cls(logp_PV, -logp_PV.gather(1, next_P[:, None])[:, 0])

    def kl_to(self, other: Predictions) -> Float[Tensor, " P"]:
        """Compute KL(self || other) in nats at each position."""
        rows = max(1, LOGITS_AT_ONCE // self.logp_PV.shape[1])
        pairs = zip(torch.split(self.logp_PV, rows), torch.split(other.logp_PV, rows), strict=True)
        return torch.cat([(p.exp() * (p - q)).sum(1) for p, q in pairs])


def totals(columns: Columns) -> Columns:
    """Sum each column over the whole set, as arrays of one entry."""
    return {name: column.sum(keepdims=True) for name, column in columns.items()}


def statistics(sums: Columns) -> Columns:
    """Compute every pooled ratio, from sums over sequences:
    arrays of one entry, or of one for each bootstrap sample."""
    s = sums
    tokens = s["tokens"]
    with np.errstate(divide="ignore", invalid="ignore"):  # an SAE that gives 0 has no gamma
        of_rows = {
            # Ratios of sums, not means of ratios: a token of small norm would otherwise weigh as much as any.
            "nmse": s["error"] / s["deviation"],
            "ev": 1 - s["error"] / s["deviation"],
            "nmse_token": s["error_token"] / s["deviation_token"],
            "nmse_btk": s["error_btk"] / tokens,
            "l0": s["l0"] / tokens,
            "cosine": s["cosine"] / tokens,
            "gamma": s["norm"] / s["dot"],
            "gamma_c": s["norm_c"] / s["dot_c"],
        }
    return of_rows | loss_statistics(sums)


def loss_statistics(sums: Columns) -> Columns:
    """Compute the ratios that need no rows: what the LM's predictions lose."""
    predicted = sums["predicted"]
    ce = {name: sums[name] / predicted for name in ("clean", "spliced", "zero", "mean")}
    with np.errstate(divide="ignore", invalid="ignore"):  # an ablation may cost nothing
        return {
            "ce_clean": ce["clean"],
            "ce_spliced": ce["spliced"],
            "ce_zero": ce["zero"],
            "ce_mean": ce["mean"],
            "ce_increase": ce["spliced"] - ce["clean"],
            "recovered_zero": (ce["zero"] - ce["spliced"]) / (ce["zero"] - ce["clean"]),
            "recovered_mean": (ce["mean"] - ce["spliced"]) / (ce["mean"] - ce["clean"]),
            "kl": sums["kl"] / predicted,
        }


def resampled(columns: Columns, *, samples: int, seed: int) -> Columns:
    """Sum each column over `samples` draws of its groups (documents, or contexts) with replacement.

    The draws are the same for all columns (paired) and, with as many groups and the same seed, for all SAEs.
    """
    names = list(columns)
    table = np.stack([columns[name] for name in names], axis=1)
    rng = np.random.default_rng(seed)
    groups = len(table)
    sums = np.empty((samples, len(names)))
    for i in range(samples):
        # A draw with replacement as counts of each group, times the table: one product a sample in place of a gather.
        sums[i] = np.bincount(rng.integers(groups, size=groups), minlength=groups) @ table
    return {name: sums[:, i] for i, name in enumerate(names)}


def without_empty(documents: Columns) -> Columns:
    """Drop from the columns the documents of which no token is scored: there is nothing to draw in them."""
    scored = (documents["tokens"] > 0) | (documents["predicted"] > 0)
    return {name: column[scored] for name, column in documents.items()}


@dataclass(frozen=True)
class SetSums:
    """The sums of one SAE over contexts, whose totals give the values, and over documents, which the errors draw."""

    contexts: Columns
    documents: Columns


def pooled(
    columns: SetSums, *, samples: int, seed: int, of: Callable[[Columns], Columns] = statistics
) -> dict[str, dict[str, float | None]]:
    """Compute every statistic (`of` the sums) of the whole set with its standard error by the paired bootstrap over
    documents.

    None stands for a value that is not finite, and for the error of fewer than two documents or samples.
    """
    values = of(totals(columns.contexts))
    documents = without_empty(columns.documents)
    drawn = of(resampled(documents, samples=samples, seed=seed))
    several = min(samples, len(documents["tokens"])) > 1
    result: dict[str, dict[str, float | None]] = {}
    for name, (value,) in values.items():
        known = several and bool(np.isfinite(drawn[name]).all())
        result[name] = {
            "value": float(value) if np.isfinite(value) else None,
            "se": float(np.std(drawn[name], ddof=1)) if known else None,
        }
    return result


def deltas(columns: SetSums, baseline: SetSums, *, samples: int, seed: int) -> dict[str, dict[str, float | None]]:
    """Compute every statistic minus the baseline's, with its standard error and 95% percentile interval by the paired
    bootstrap (each sample draws the same documents for both). None stands for what is not finite.

    Raises AssertionError unless both are of the same documents in the same order.
    """
    own, others = without_empty(columns.documents), without_empty(baseline.documents)
    assert np.array_equal(own["tokens"], others["tokens"])
    value_own, value_other = statistics(totals(columns.contexts)), statistics(totals(baseline.contexts))
    drawn_own = statistics(resampled(own, samples=samples, seed=seed))
    drawn_other = statistics(resampled(others, samples=samples, seed=seed))
    several = min(samples, len(own["tokens"])) > 1
    result: dict[str, dict[str, float | None]] = {}
    for name in value_own:
        value = float(value_own[name][0] - value_other[name][0])
        # The same seed and as many groups give both the same draws: what documents have in common cancels in the
        # difference.
        draws = drawn_own[name] - drawn_other[name]
        known = several and bool(np.isfinite(draws).all())
        low, high = np.percentile(draws, [2.5, 97.5]) if known else (None, None)
        result[name] = {
            "value": value if np.isfinite(value) else None,
            "se": float(np.std(draws, ddof=1)) if known else None,
            "low": None if low is None else float(low),
            "high": None if high is None else float(high),
        }
    return result
