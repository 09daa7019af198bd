"""All SAEs of one site over the held-out contexts: a clean, a zero and a mean forward a batch, one spliced an SAE.

Transcoders into the site stand beside its SAEs: each is given the rows that it reads, and its output takes the place of
the site's rows. So do crosscoders: each is given the untouched rows of all its sites, and what it makes of this one
takes the place of its rows; no other site is replaced. Letters: B contexts of a batch, T tokens of a context, N kept
tokens of the batch, P predicted tokens of the batch, S contexts of the set, D width of the site, E width of what is
read, F latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from data.base.sites import Site
from evaluate.documents import Documents
from evaluate.forms import SHIPPED, AtSite, InferenceForm, as_form, form_of
from evaluate.massive import is_massive
from evaluate.metrics import (
    Columns,
    Firing,
    GroupedSums,
    Reconstruction,
    SetSums,
    pooled,
    scored_positions,
    without_empty,
)
from evaluate.splice import Splice
from harvest.hooks import run_to
from train.sae.base import SAE

ACTIVATIONS_AT_ONCE = 1 << 25  # entries of the [rows, F] activations in memory at a time: 128 MB in float32
# Of `metrics.statistics`, those that are of the rows alone and so differ between ordinary and all rows.
OF_ROWS = ("nmse", "ev", "nmse_token", "nmse_btk", "l0", "cosine", "gamma", "gamma_c")


@dataclass(frozen=True)
class TokenPlaces:
    """Where N tokens are: the number of the context, the document, and the position in the context (on the CPU)."""

    context_N: Int64[Tensor, " N"]
    document_N: Int64[Tensor, " N"]
    position_N: Int64[Tensor, " N"]

    def __getitem__(self, rows: Tensor | slice) -> TokenPlaces:
        return TokenPlaces(self.context_N[rows], self.document_N[rows], self.position_N[rows])


class TokenObserver(Protocol):
    """Something that is shown the activations of every token that an SAE is scored on."""

    def update(self, f_NF: Float[Tensor, "N F"], places: TokenPlaces) -> None:
        """Take in the activations of N tokens."""


class RowSums:
    """Sums over a set of rows: their reconstruction and how the latents fire on them."""

    def __init__(self, width: int, mean_D: Tensor, shape: tuple[int, int], n_documents: int) -> None:
        n_contexts, context = shape
        self.reconstruction = Reconstruction(mean_D, n_contexts, n_documents)
        self.firing = Firing(width, context, n_contexts, n_documents)

    def update(self, x_ND: Tensor, x_hat_ND: Tensor, empty_ND: Tensor, f_NF: Tensor, places: TokenPlaces) -> None:
        """Add rows."""
        self.reconstruction.update(x_ND, x_hat_ND, empty_ND, places.context_N, places.document_N)
        self.firing.update(f_NF, places.context_N, places.position_N, places.document_N)


class SAEScore:
    """The sums of one SAE in one form: of the ordinary rows, of the massive ones, and the losses of the splice.

    observers: shown the activations of every token, in the order in which the tokens are read.
    """

    def __init__(
        self, form: InferenceForm, mean_D: Tensor, shape: tuple[int, int], n_documents: int | None = None
    ) -> None:
        n_contexts = shape[0]
        n_documents = n_contexts if n_documents is None else n_documents
        self.form, self.sae = form, form.sae
        self.ordinary = RowSums(self.sae.width, mean_D, shape, n_documents)
        self.massive = RowSums(self.sae.width, mean_D, shape, n_documents)
        self.losses = GroupedSums(("spliced", "kl"), n_contexts, n_documents)
        self.observers: list[TokenObserver] = []

    @property
    def reconstruction(self) -> Reconstruction:
        """Return the sums over the ordinary rows."""
        return self.ordinary.reconstruction

    @property
    def firing(self) -> Firing:
        """Return the firing on the ordinary rows."""
        return self.ordinary.firing

    @torch.inference_mode()
    def reconstruct(
        self, x_NE: Tensor, places: TokenPlaces, massive_N: Tensor | None = None, target_ND: Tensor | None = None
    ) -> Tensor:
        """Compute x_hat [N, D] in model units; adds what is to be counted of it.

        target_ND: the rows that x_hat stands for, where they are others than those that are read.
        """
        assert x_NE.shape[1] == self.sae.d_in
        target_ND = x_NE if target_ND is None else target_ND
        self.sae.to(x_NE.device)
        rows = len(x_NE) if self.form.needs_whole_batch else ACTIVATIONS_AT_ONCE // self.sae.width
        rows = max(1, rows)
        parts = []
        for first in range(0, len(x_NE), rows):
            part = slice(first, first + rows)
            x = x_NE[part]
            f, x_hat = self.form.run(x)
            massive = None if massive_N is None else massive_N[part]
            self._count(target_ND[part].to(x_hat.device), f, x_hat, self._empty(x), places[part], massive)
            parts.append(x_hat)
        return torch.cat(parts) if parts else target_ND

    def _empty(self, x: Tensor) -> Tensor:
        """Compute what the decoder gives with no latent active: gamma_c measures shrinkage of what they add to it."""
        sae = self.sae
        beside = sae.beside_latents(sae.norm.normalise(x))
        empty = sae.norm_out.denormalise(beside.expand(len(x), sae.d_out), x)
        return empty[:, self.form.entries] if isinstance(self.form, AtSite) else empty

    def _count(
        self, x: Tensor, f: Tensor, x_hat: Tensor, empty: Tensor, places: TokenPlaces, massive: Tensor | None
    ) -> None:
        if massive is None:
            self.ordinary.update(x, x_hat, empty, f, places)
        else:
            for chosen, sums in ((~massive, self.ordinary), (massive, self.massive)):
                sums.update(x[chosen], x_hat[chosen], empty[chosen], f[chosen], places[chosen.cpu()])
        for observer in self.observers:
            observer.update(f, places)

    def add_losses(self, ce_P: Tensor, kl_P: Tensor, context_P: Tensor, document_P: Tensor) -> None:
        """Add the losses of a batch spliced with what `reconstruct` gave."""
        self.losses.add("spliced", ce_P, context_P, document_P)
        self.losses.add("kl", kl_P, context_P, document_P)


class SiteScore:
    """The sums of one site, filled batch by batch.

    mean_D: the training mean, the constant of the mean ablation. storage: the store's dtype, whose rounding is a line
    of its own. shape: (S, T). form: the name of the form of those `saes` that are not a form already. documents: which
    document each token is of, else each context is one. massive_limits: the largest norm of an ordinary row, by the
    site that is read. elsewhere: sites of other models, which read the same tokens, by a crosscoder's names for them.
    """

    def __init__(
        self,
        splice: Splice,
        saes: Sequence[SAE | InferenceForm],
        mean_D: Tensor,
        storage: torch.dtype,
        shape: tuple[int, int],
        form: str = SHIPPED,
        *,
        documents: Documents | None = None,
        massive_limits: Mapping[str, float] | None = None,
        elsewhere: Mapping[str, tuple[nn.Module, Site]] | None = None,
    ) -> None:
        self.splice, self.mean_D, self.storage = splice, mean_D, storage
        self.documents = documents or Documents.one_a_context(*shape)
        self.massive_limits, self.elsewhere = massive_limits or {}, elsewhere or {}
        forms = [form_of(sae, form) if isinstance(sae, SAE) else as_form(sae) for sae in saes]
        self.scores = [SAEScore(one, mean_D, shape, self.documents.count) for one in forms]
        self.rounding = Reconstruction(mean_D, shape[0])
        self.shared = GroupedSums(("predicted", "clean", "zero", "mean"), shape[0], self.documents.count)
        self.massive_rows = 0

    def batch(self, ids_BT: Tensor, keep_BT: Tensor, first: int) -> None:
        """Add a batch, whose contexts are number `first` and those after it."""
        contexts = range(first, first + len(ids_BT))
        keep, scored = keep_BT.cpu(), scored_positions(keep_BT.cpu())
        context_BT = torch.arange(contexts.start, contexts.stop)[:, None].expand(keep.shape)
        document_BT = torch.from_numpy(self.documents.numbers(contexts))
        position_BT = torch.arange(keep.shape[1]).expand(keep.shape)
        places = TokenPlaces(context_BT[keep], document_BT[keep], position_BT[keep])
        context_P, document_P = context_BT[:, 1:][scored], document_BT[:, 1:][scored]

        clean = self.splice.clean(ids_BT, keep_BT)
        self.shared.add("predicted", torch.ones_like(clean.ce_P), context_P, document_P)
        self.shared.add("clean", clean.ce_P, context_P, document_P)
        # Both once a batch, not once an SAE: they do not depend on it.
        ablations = {"zero": torch.zeros_like(clean.x_ND), "mean": self.mean_D.float().expand(clean.x_ND.shape)}
        for name, rows_ND in ablations.items():
            self.shared.add(name, self.splice.ablated(clean, rows_ND), context_P, document_P)

        inputs = {name: x_NE.float() for name, x_NE in clean.inputs.items()}  # the SAEs' own dtype
        x_ND = inputs[str(self.splice.site)]
        massive_N = is_massive(inputs, self.massive_limits)
        self._round(x_ND, places, massive_N)
        for name, (model, site) in self.elsewhere.items():
            read_BTE = run_to(model, [site], ids_BT)[str(site)]
            inputs[name] = read_BTE[keep_BT.to(read_BTE.device)].float().to(x_ND.device)
        for score in self.scores:
            x_hat_ND = score.reconstruct(self._read_by(score, inputs), places, massive_N, x_ND)
            score.add_losses(*self.splice.spliced(clean, x_hat_ND), context_P, document_P)

    def _read_by(self, score: SAEScore, inputs: Mapping[str, Tensor]) -> Tensor:
        if isinstance(score.form, AtSite):
            return torch.cat([inputs[name] for name in score.form.reads], 1)
        return inputs[self.input_of(score.sae)]

    def input_of(self, sae: SAE) -> str:
        """Name the site that an SAE of this score reads: this one, or a transcoder's own."""
        site = sae.site if sae.transcodes else None
        return str(self.splice.site) if site is None else site

    def _round(self, x_ND: Tensor, places: TokenPlaces, massive_N: Tensor | None) -> None:
        context_N = places.context_N
        if massive_N is not None:
            self.massive_rows += int(massive_N.sum())
            x_ND, context_N = x_ND[~massive_N], context_N[~massive_N.cpu()]
        self.rounding.update(x_ND, x_ND.to(self.storage).float(), torch.zeros_like(x_ND), context_N)

    def storage_nmse(self) -> float:
        """Compute the NMSE of rounding ordinary rows to the store's dtype, with no SAE."""
        table = self.rounding.table()
        return float(table["error"].sum() / table["deviation"].sum())

    def columns(self, score: SAEScore) -> Columns:
        """Return the per-context sums of one SAE over the ordinary rows, those of the site included."""
        return self.sums(score).contexts

    def sums(self, score: SAEScore, *, all_rows: bool = False) -> SetSums:
        """Return the sums of one SAE by context and by document, over the ordinary rows or over all of them."""
        reconstruction, l0 = score.ordinary.reconstruction, score.ordinary.firing.sums
        if all_rows:
            reconstruction = reconstruction.merged(score.massive.reconstruction)
            l0 = l0.merged(score.massive.firing.sums)
        groups = (self.shared, score.losses, l0)
        contexts, documents = reconstruction.table("context"), reconstruction.table("document")
        for group in groups:
            contexts |= group.table("context")
            documents |= group.table("document")
        return SetSums(contexts, documents)

    def n_documents(self) -> int:
        """Return how many documents have a token that is scored."""
        return len(without_empty(self.sums(self.scores[0], all_rows=True).documents)["tokens"])

    def result(self, *, samples: int, seed: int) -> list[dict[str, Any]]:
        """Return for each SAE its statistics with bootstrap errors, its firing, the share of storage rounding in its
        error; and, where massive rows were scored, the statistics over all rows."""
        results = []
        for score in self.scores:
            metrics = pooled(self.sums(score), samples=samples, seed=seed)
            nmse = metrics["nmse"]["value"]
            share = self.storage_nmse() / nmse if nmse else None
            row = {"form": score.form.name, "metrics": metrics, "l0": score.firing.result(), "storage_share": share}
            if self.massive_rows:
                every = pooled(self.sums(score, all_rows=True), samples=samples, seed=seed)
                row["all_rows"] = {name: every[name] for name in OF_ROWS}
            results.append(row)
        return results
