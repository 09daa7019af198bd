"""What the LM predicts when the site's tensor is another: the runs behind every cross-entropy.

What is put at a site was made from that site (an SAE's x_hat) or from others (a transcoder's prediction of it): `clean`
gives the rows of all of them in one forward.

Letters: B contexts of a batch, T tokens of a context, N kept tokens of the batch, P predicted tokens of the batch,
D width of the site, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from data.base.sites import Site
from evaluate.lm_parts import LayersBelow, Unembedding
from evaluate.metrics import Predictions, scored_positions
from harvest.hooks import capture, replace

LOGITS_WHOLE = 1 << 26  # entries of a batch's logits that are made at once: 256 MB in float32
LOGITS_IN_PARTS = 1 << 24  # entries made at a time where a batch has more


@dataclass(frozen=True)
class CleanRun:
    """A batch that the untouched LM has read.

    x_ND: the kept rows of the site in the LM's own dtype. inputs: those of each site that is read, by name, the site
    itself among them. hidden: of the untouched LM, as `Unembedding` gives it. predictions: those of the batch, where
    its logits are made at once.
    """

    ids_BT: Int64[Tensor, "B T"]
    keep_BT: Bool[Tensor, "B T"]
    x_ND: Float[Tensor, "N D"]
    inputs: Mapping[str, Float[Tensor, "N _"]]
    hidden: Float[Tensor, "B T _"]
    ce_P: Float[Tensor, " P"]
    predictions: Predictions | None


def with_rows(
    x_BTD: Float[Tensor, "B T D"], keep_BT: Bool[Tensor, "B T"], rows_ND: Float[Tensor, "N D"]
) -> Float[Tensor, "B T D"]:
    """Copy x with its kept rows replaced, cast to its dtype."""
    changed_BTD = x_BTD.clone()
    # Rows that were not kept (BOS and the like) stay clean, as the SAE was never trained on them.
    changed_BTD[keep_BT.to(x_BTD.device)] = rows_ND.to(x_BTD.device, x_BTD.dtype)
    return changed_BTD


class Splice:
    """One LM at one site. What is put there replaces exactly the kept rows of exactly the tensor that `capture` reads;
    the rows of excluded tokens are left as they are, in every run alike.

    inputs: other sites whose rows the clean run gives too, for what reads them and predicts this one.
    """

    def __init__(self, model: nn.Module, site: Site, inputs: Sequence[Site] = ()) -> None:
        self.model, self.site = model, site
        self.inputs = tuple(dict.fromkeys((site, *inputs)))
        self.below, self.head = LayersBelow(model, site), Unembedding(model)
        self._proved = False

    @torch.inference_mode()
    def clean(self, ids_BT: Int64[Tensor, "B T"], keep_BT: Bool[Tensor, "B T"]) -> CleanRun:
        """Run the untouched LM on a batch."""
        if not self._proved:
            self._prove(ids_BT)
        # The clean forward goes to the end: its logits are the reference of the KL, and its sites are what is read.
        with self.below.remember(), capture(self.model, self.inputs, stop=False) as seen:
            hidden = self.head.hidden(ids_BT)
        rows = {name: x_BTD[keep_BT.to(x_BTD.device)] for name, x_BTD in seen.items()}
        parts = list(self._predictions(hidden, ids_BT, keep_BT))
        ce_P = torch.cat([part.ce_P for part in parts])
        whole = parts[0] if len(parts) == 1 else None
        return CleanRun(ids_BT, keep_BT, rows[str(self.site)], rows, hidden, ce_P, whole)

    @torch.inference_mode()
    def spliced(
        self, clean: CleanRun, rows_ND: Float[Tensor, "N D"]
    ) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
        """Give CE and KL(clean || spliced) in nats with `rows_ND`, cast to the LM's dtype, in place of the kept rows.

        `clean` must be the last batch that was run clean: the layers below the site are not run again.
        """
        return self.compare(clean, self._hidden(clean, rows_ND))

    @torch.inference_mode()
    def ablated(self, clean: CleanRun, rows_ND: Float[Tensor, "N D"]) -> Float[Tensor, " P"]:
        """Give the CE of `spliced` alone."""
        return self.cross_entropy(clean, self._hidden(clean, rows_ND))

    @torch.inference_mode()
    def compare(
        self, clean: CleanRun, hidden: Float[Tensor, "B T _"]
    ) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
        """Give CE and KL(clean || changed) of a changed run of the same batch, whose `Unembedding.hidden` this is."""
        ce, kl = [], []
        for before, after in zip(self._clean_predictions(clean), self._after(hidden, clean), strict=True):
            ce.append(after.ce_P)
            kl.append(before.kl_to(after))
        return torch.cat(ce), torch.cat(kl)

    @torch.inference_mode()
    def cross_entropy(self, clean: CleanRun, hidden: Float[Tensor, "B T _"]) -> Float[Tensor, " P"]:
        """Give the CE of `compare` alone."""
        return torch.cat([after.ce_P for after in self._after(hidden, clean)])

    def _hidden(self, clean: CleanRun, rows_ND: Tensor) -> Tensor:
        def put(x_BTD: Tensor) -> Tensor:
            return with_rows(x_BTD, clean.keep_BT, rows_ND)

        with self.below.skip(), replace(self.model, self.site, put):
            return self.head.hidden(clean.ids_BT)

    def _after(self, hidden: Tensor, clean: CleanRun) -> Iterator[Predictions]:
        return self._predictions(hidden, clean.ids_BT, clean.keep_BT)

    def _clean_predictions(self, clean: CleanRun) -> Iterator[Predictions]:
        if clean.predictions is not None:
            return iter([clean.predictions])
        return self._predictions(clean.hidden, clean.ids_BT, clean.keep_BT)

    def _predictions(self, hidden: Tensor, ids_BT: Tensor, keep_BT: Tensor) -> Iterator[Predictions]:
        """Predict the scored tokens, in one piece where that fits and else some rows at a time."""
        at = hidden.device  # of the last layer, where the LM is spread over several devices
        ids_BT, scored = ids_BT.to(at), scored_positions(keep_BT.to(at))
        n_vocabulary = self._vocabulary(hidden)
        if self.head.whole or hidden.shape[0] * hidden.shape[1] * n_vocabulary <= LOGITS_WHOLE:
            yield Predictions.of(self.head.logits(hidden), ids_BT, scored)
            return
        # Logits of V = 100,000 and more are by far the largest tensor of an evaluation: of the scored rows only, and in
        # parts.
        hidden_PD, next_P = hidden[:, :-1][scored], ids_BT[:, 1:][scored]
        rows = max(1, LOGITS_IN_PARTS // n_vocabulary)
        for first in range(0, len(next_P), rows):
            part = slice(first, first + rows)
            yield Predictions.of_rows(self.head.logits(hidden_PD[None, part])[0], next_P[part])

    def _vocabulary(self, hidden: Tensor) -> int:
        if self.head.whole:
            return hidden.shape[-1]
        return int(self.head.logits(hidden[:1, :1].contiguous()).shape[-1])

    def _prove(self, ids_BT: Tensor) -> None:
        """Check on the first batch that what is to be left out changes no bit; what does is run whole from then on."""
        self.head.prove(ids_BT)
        with self.below.remember():
            expected = self.head.hidden(ids_BT)
        try:
            with self.below.skip():
                equal = torch.equal(self.head.hidden(ids_BT), expected)
        except (RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError):
            equal = False  # a block that takes or gives something else than its input's like
        # Some architectures carry more from block to block than one tensor. There the layers below are run again each
        # time: slower, never wrong.
        if not equal:
            self.below.blocks = []
        self._proved = True
