"""A set of SAEs and transcoders at work in one forward, such as a transcoder in place of every MLP: the replacement
model, and what it costs in cross-entropy.

Each part reads what it is given there, behind the replacements below it, so that their errors add up as they would in
use; `score.py` replaces one site at a time. Letters: B contexts of a batch, T tokens of a context, N kept tokens of the
batch, S contexts of the set, D width of a site, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from data.base.errors import UserError
from data.base.progress import progress
from data.base.records import Json
from data.base.sites import Site
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import Store
from evaluate.config import EvaluateSettings
from evaluate.forms import InferenceForm, form_of
from evaluate.inputs import SavedSAE
from evaluate.massive import ScoredText
from evaluate.metrics import Columns, GroupedSums, SetSums, loss_statistics, pooled, scored_positions, without_empty
from evaluate.splice import Splice, with_rows
from harvest.hooks import capture, replace
from train.sae.io import load


class ReplacementModel:
    """An LM with the output of each form at its target, all in one forward.

    forms: by the target of each. inputs: the site that each reads, by its target.
    """

    def __init__(self, model: nn.Module, forms: dict[str, InferenceForm], inputs: dict[str, str]) -> None:
        self.model, self.forms, self.inputs = model, forms, inputs

    @contextmanager
    def at_work(self, keep_BT: Bool[Tensor, "B T"], active: list[Float[Tensor, " N"]]) -> Iterator[None]:
        """Replace the kept rows of every target in the forwards inside the context; L0 of each part goes to `active`.

        Raises UserError where a part would read a site that is computed after its target.
        """
        seen: dict[str, Tensor] = {}

        def put(target: str, x_BTD: Tensor) -> Tensor:
            source = self.inputs[target]
            read_BTD = x_BTD if source == target else seen.get(source)
            if read_BTD is None:
                raise UserError(
                    f"together=true needs {source} before {target} in the forward, and it is computed later: "
                    "leave out what reads it"
                )
            form = self.forms[target]
            # To the device of the forms, for the layers of the LM may lie on several.
            rows_ND = read_BTD[keep_BT.to(read_BTD.device)].to(keep_BT.device, torch.float32)
            f_NF, x_hat_ND = form.run(rows_ND)
            active.append((f_NF > 0).sum(1))
            return with_rows(x_BTD, keep_BT, x_hat_ND)

        with self._replaced(put) as stack:
            others = [Site.parse(source) for target, source in self.inputs.items() if source != target]
            if others:
                # After the replacements, so that a site which is itself replaced is read as it then is.
                seen = stack.enter_context(capture(self.model, others, stop=False))
            yield

    @contextmanager
    def constant(self, keep_BT: Bool[Tensor, "B T"], rows: Callable[[str], Float[Tensor, " D"]]) -> Iterator[None]:
        """Put one vector for each target in the place of its kept rows: the ablation of all at once."""

        def put(target: str, x_BTD: Tensor) -> Tensor:
            row_D = rows(target).to(x_BTD.device, torch.float32)
            return with_rows(x_BTD, keep_BT, row_D.expand(int(keep_BT.sum()), -1))

        with self._replaced(put):
            yield

    @contextmanager
    def _replaced(self, put: Callable[[str, Tensor], Tensor]) -> Iterator[ExitStack]:
        with ExitStack() as stack:
            for target in self.forms:

                def at_target(x_BTD: Tensor, target: str = target) -> Tensor:
                    return put(target, x_BTD)

                stack.enter_context(replace(self.model, Site.parse(target), at_target))
            yield stack


class TogetherScore:
    """The sums of a replacement model, filled batch by batch. means: the training mean of each target."""

    def __init__(self, parts: ReplacementModel, means: dict[str, Tensor], scored: ScoredText) -> None:
        self.parts, self.means, self.documents = parts, means, scored.text.documents
        # For its clean run and the way to the logits; no layer can be left out below several sites.
        self.splice = Splice(parts.model, Site.parse(next(iter(parts.forms))))
        n_contexts = len(scored.text.packed.contexts)
        self.sums = GroupedSums(
            ("tokens", "l0", "predicted", "clean", "spliced", "zero", "mean", "kl"), n_contexts, self.documents.count
        )

    @torch.inference_mode()
    def batch(self, ids_BT: Int64[Tensor, "B T"], keep_BT: Bool[Tensor, "B T"], first: int) -> None:
        """Add a batch, whose contexts are number `first` and those after it."""
        contexts = range(first, first + len(ids_BT))
        keep, scored = keep_BT.cpu(), scored_positions(keep_BT.cpu())
        context_BT = torch.arange(contexts.start, contexts.stop)[:, None].expand(keep.shape)
        document_BT = torch.from_numpy(self.documents.numbers(contexts))
        of_tokens = (context_BT[keep], document_BT[keep])
        of_predicted = (context_BT[:, 1:][scored], document_BT[:, 1:][scored])

        clean = self.splice.clean(ids_BT, keep_BT)
        active: list[Tensor] = []
        with self.parts.at_work(keep_BT, active):
            hidden = self.splice.head.hidden(ids_BT)
        ce_P, kl_P = self.splice.compare(clean, hidden)
        losses = {"predicted": torch.ones_like(ce_P), "clean": clean.ce_P, "spliced": ce_P, "kl": kl_P}
        ablations: dict[str, Callable[[str], Tensor]] = {
            "zero": lambda target: torch.zeros_like(self.means[target]),
            "mean": lambda target: self.means[target],
        }
        for name, rows in ablations.items():
            with self.parts.constant(keep_BT, rows):
                hidden = self.splice.head.hidden(ids_BT)
            losses[name] = self.splice.cross_entropy(clean, hidden)
        for name, value_P in losses.items():
            self.sums.add(name, value_P, *of_predicted)
        l0_N = torch.stack([l0.cpu() for l0 in active]).sum(0)
        self.sums.add("l0", l0_N, *of_tokens)
        self.sums.add("tokens", torch.ones_like(l0_N), *of_tokens)

    def result(self, *, samples: int, seed: int) -> Json:
        """Return the statistics with their bootstrap errors."""
        sums = SetSums(self.sums.table("context"), self.sums.table("document"))
        return {
            "tokens": int(sums.contexts["tokens"].sum()),
            "predicted": int(sums.contexts["predicted"].sum()),
            "documents": len(without_empty(sums.documents)["tokens"]),
            "metrics": pooled(sums, samples=samples, seed=seed, of=_statistics),
        }


def _statistics(sums: Columns) -> Columns:
    return {"l0": sums["l0"] / sums["tokens"], **loss_statistics(sums)}


def require_one_a_target(saes: Sequence[SavedSAE]) -> None:
    """Raise UserError where two SAEs stand for one site, of which only one can be at work."""
    first: dict[tuple[str, str], Path] = {}
    for sae in saes:
        other = first.setdefault((sae.config["fingerprint"], sae.target), sae.folder)
        if other != sae.folder:
            raise UserError(
                f"together=true puts one SAE or transcoder at each site, and both {other} and {sae.folder} are for "
                f"{sae.target}: name one of them in saes"
            )


def measure_together(store: Store, saes: Sequence[SavedSAE], scored: ScoredText, settings: EvaluateSettings) -> Json:
    """Run all SAEs of a store at once over the text: one entry of the report's `together`."""
    text = scored.text
    forms = {sae.target: form_of(load(sae.folder).to(text.device), settings.form) for sae in saes}
    inputs = {sae.target: sae.site for sae in saes}
    means = {target: torch.from_numpy(store.stats(TRAIN, target).mean) for target in forms}
    score = TogetherScore(ReplacementModel(text.model, forms, inputs), means, scored)
    total = int(text.packed.keep.sum())
    label = f"evaluate {len(saes)} together"
    with progress(label, total, "tokens") as bar:
        for batch in text.batches():
            score.batch(batch.ids_BT, batch.keep_BT, batch.numbers.start)
            bar.update(int(batch.keep_BT.sum()))
    return {
        "model": store.manifest.name,
        "store": store.path.name,
        "fingerprint": store.manifest.fingerprint,
        "split": "own text" if text.own else HELDOUT,
        "saes": [{"folder": str(sae.folder), "site": sae.site, "target": sae.target} for sae in saes],
        **score.result(samples=settings.bootstrap, seed=settings.seed),
    }
