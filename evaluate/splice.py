"""What the LM predicts when the site's tensor is another: the runs behind every cross-entropy.

Letters: B contexts of a batch, T tokens of a context, N kept tokens of the batch, D width of the site, V vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from evaluate.metrics import Predictions, scored_positions
from harvest.hooks import Site, capture, replace


class Splice:
    """One LM at one site. What is put there replaces exactly the kept rows of exactly the tensor that `capture` reads;
    the rows of excluded tokens are left as they are, in every run alike."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.model, self.site = model, site

    @torch.inference_mode()
    def clean(
        self, ids_BT: Int64[Tensor, "B T"], keep_BT: Bool[Tensor, "B T"]
    ) -> tuple[Predictions, Float[Tensor, "N D"]]:
        """The predictions of the untouched LM, and the kept rows of the site in the LM's own dtype."""
        with capture(self.model, [self.site], stop=False) as seen:
            predictions = self._predict(ids_BT, keep_BT)
        x_BTD = seen[str(self.site)]
        return predictions, x_BTD[keep_BT.to(x_BTD.device)]

    @torch.inference_mode()
    def instead(
        self, ids_BT: Int64[Tensor, "B T"], keep_BT: Bool[Tensor, "B T"], rows_ND: Float[Tensor, "N D"]
    ) -> Predictions:
        """The predictions with `rows_ND`, cast to the LM's dtype, in place of the kept rows."""

        def put(x_BTD: Tensor) -> Tensor:
            changed_BTD = x_BTD.clone()
            changed_BTD[keep_BT.to(x_BTD.device)] = rows_ND.to(x_BTD.device, x_BTD.dtype)
            return changed_BTD

        with replace(self.model, self.site, put):
            return self._predict(ids_BT, keep_BT)

    def _predict(self, ids_BT: Tensor, keep_BT: Tensor) -> Predictions:
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        at = logits_BTV.device  # of the last layer, where the LM is spread over several devices
        return Predictions.of(logits_BTV, ids_BT.to(at), scored_positions(keep_BT.to(at)))
