"""All SAEs of one site over the held-out contexts: a clean, a zero and a mean forward a batch, one spliced an SAE.

Letters: B contexts of a batch, T tokens of a context, N kept tokens of the batch, P predicted tokens of the batch,
S contexts of the set, D model width, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evaluate.metrics import Columns, Firing, Predictions, Reconstruction, pooled, scored_positions
from evaluate.splice import Splice
from train.sae.base import SAE
from train.sae.variants.batchtopk import BatchTopKBase

ACTIVATIONS_AT_ONCE = 1 << 25  # entries of the [rows, F] activations held at a time: 128 MB in float32
SHIPPED, BATCH = "shipped", "batch"  # the forms an SAE can be scored in
FORMS = (SHIPPED, BATCH)


def column(sequences: int) -> Tensor:
    return torch.zeros(sequences, dtype=torch.float64)


class SAEScore:
    """The sums of one SAE.

    form: `shipped`, or `batch`: BatchTopK and Matryoshka then take the k * N largest z of each batch of N kept tokens,
    as in training; of the other variants the two are one.
    """

    def __init__(self, sae: SAE, mean_D: Tensor, shape: tuple[int, int], form: str = SHIPPED) -> None:
        assert form in FORMS
        sequences, context = shape
        self.sae = sae
        self.form = form if isinstance(sae, BatchTopKBase) else SHIPPED
        self.reconstruction = Reconstruction(mean_D, sequences)
        self.firing = Firing(sae.width, context, sequences)
        self.spliced, self.kl = column(sequences), column(sequences)

    @torch.inference_mode()
    def reconstruct(self, x_ND: Tensor, sequence_N: Tensor, position_N: Tensor) -> Tensor:
        """x_hat [N, D] in model units; adds what is to be counted of it."""
        assert x_ND.shape[1] == self.sae.d_in
        self.sae.to(x_ND.device)
        whole = self.form == BATCH or getattr(self.sae, "of_batch", False)
        rows = max(1, len(x_ND) if whole else ACTIVATIONS_AT_ONCE // self.sae.width)
        parts = []
        for x, sequence, position in zip(*(torch.split(t, rows) for t in (x_ND, sequence_N, position_N)), strict=True):
            f, x_hat = self._run(x)
            empty = self.sae.norm.denormalise(self.sae.b_dec.expand_as(x), x)
            self.reconstruction.update(x, x_hat, empty, sequence)
            self.firing.update(f, sequence, position)
            parts.append(x_hat)
        return torch.cat(parts)

    def _run(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """f [N, F] and x_hat [N, D]."""
        if self.form == SHIPPED:
            return self.sae.encode_decode(x_ND)
        assert isinstance(self.sae, BatchTopKBase)
        codes, f = self.sae.active_batch(self.sae.norm.normalise(x_ND))
        return codes.dense(f), self.sae.norm.denormalise(self.sae.decode_sparse(codes, f), x_ND)

    def predicted(self, clean: Predictions, spliced: Predictions, sequence_P: Tensor) -> None:
        """Add the losses of a batch."""
        self.spliced.index_add_(0, sequence_P, spliced.ce_P.double().cpu())
        self.kl.index_add_(0, sequence_P, clean.kl_to(spliced).double().cpu())


class SiteScore:
    """The sums of one site, filled batch by batch.

    mean_D: the training mean, the constant of the mean ablation. storage: the store's dtype, whose rounding is a line
    of its own. shape: (S, T). form: of the SAEs (SAEScore).
    """

    def __init__(
        self,
        splice: Splice,
        saes: Sequence[SAE],
        mean_D: Tensor,
        storage: torch.dtype,
        shape: tuple[int, int],
        form: str = SHIPPED,
    ) -> None:
        self.splice, self.mean_D, self.storage = splice, mean_D, storage
        self.scores = [SAEScore(sae, mean_D, shape, form) for sae in saes]
        self.rounding = Reconstruction(mean_D, shape[0])
        self.shared = {name: column(shape[0]) for name in ("predicted", "clean", "zero", "mean")}

    def batch(self, ids_BT: Tensor, keep_BT: Tensor, first: int) -> None:
        """Add a batch, whose contexts are number `first` and those after it."""
        at = torch.arange(first, first + len(ids_BT))[:, None].expand(keep_BT.shape)
        keep, scored = keep_BT.cpu(), scored_positions(keep_BT.cpu())
        sequence_N, sequence_P = at[keep], at[:, 1:][scored]
        position_N = torch.arange(keep.shape[1]).expand(keep.shape)[keep]

        clean, x_ND = self.splice.clean(ids_BT, keep_BT)
        self._add("predicted", torch.ones_like(clean.ce_P), sequence_P)
        self._add("clean", clean.ce_P, sequence_P)
        for name, rows_ND in (("zero", torch.zeros_like(x_ND)), ("mean", self.mean_D.float().expand(x_ND.shape))):
            self._add(name, self.splice.instead(ids_BT, keep_BT, rows_ND).ce_P, sequence_P)

        x_ND = x_ND.float()  # the SAEs' own dtype
        self.rounding.update(x_ND, x_ND.to(self.storage).float(), torch.zeros_like(x_ND), sequence_N)
        for score in self.scores:
            x_hat_ND = score.reconstruct(x_ND, sequence_N, position_N)
            score.predicted(clean, self.splice.instead(ids_BT, keep_BT, x_hat_ND), sequence_P)

    def _add(self, name: str, value_P: Tensor, sequence_P: Tensor) -> None:
        self.shared[name].index_add_(0, sequence_P, value_P.double().cpu())

    def storage_nmse(self) -> float:
        """NMSE of rounding to the store's dtype, with no SAE."""
        table = self.rounding.table()
        return float(table["error"].sum() / table["deviation"].sum())

    def columns(self, score: SAEScore) -> Columns:
        """The per-context sums of one SAE, those of the site included."""
        own = {"l0": score.firing.l0, "spliced": score.spliced, "kl": score.kl}
        return score.reconstruction.table() | {name: sums.numpy() for name, sums in (self.shared | own).items()}

    def result(self, *, samples: int, seed: int) -> list[dict[str, Any]]:
        """For each SAE: statistics with bootstrap errors, its firing, the share of storage rounding in its error."""
        rows = []
        for score in self.scores:
            metrics = pooled(self.columns(score), samples=samples, seed=seed)
            nmse = metrics["nmse"]["value"]
            share = self.storage_nmse() / nmse if nmse else None
            rows.append({"form": score.form, "metrics": metrics, "l0": score.firing.result(), "storage_share": share})
        return rows
