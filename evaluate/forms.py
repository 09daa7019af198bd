"""The forms a trained SAE can be scored in: its inference form, or the training form that depends on the batch.

Letters: N tokens, D model width (of all sites of a crosscoder), E that of one of its sites, F latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from train.sae.base import SAE
from train.sae.variants.batchtopk import BatchTopKBase

SHIPPED, BATCH = "shipped", "batch"  # the names of the forms in settings and in report.json


@runtime_checkable
class InferenceForm(Protocol):
    """A way to get activations and reconstructions from an SAE's weights.

    name: what a report calls it. needs_whole_batch: whether a token's activations depend on the other rows of the
    batch, so that a batch may not be cut to save memory.
    """

    name: str
    needs_whole_batch: bool

    @property
    def sae(self) -> SAE:
        """Return the weights, the normalisation and b_dec."""

    def run(self, x_ND: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N D"]]:
        """Give f and x_hat of model-unit input, both in model units."""


class OwnForm:
    """What a user of the SAE gets: its `encode` and `forward`."""

    name = SHIPPED
    needs_whole_batch = False

    def __init__(self, sae: SAE) -> None:
        self.sae = sae

    def run(self, x_ND: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N D"]]:
        """Give f and x_hat in the SAE's inference form."""
        return self.sae.encode_decode(x_ND)


class BatchForm:
    """BatchTopK and Matryoshka as in training: f is relu of the k * N largest z of the batch of N rows."""

    name = BATCH
    needs_whole_batch = True

    def __init__(self, sae: BatchTopKBase) -> None:
        self.sae = sae

    def run(self, x_ND: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N D"]]:
        """Give f and x_hat of the batch that is read."""
        xn_ND = self.sae.norm.normalise(x_ND)
        codes, f = self.sae.active_batch(xn_ND)
        return codes.dense(f), self.sae.norm_out.denormalise(self.sae.decode_sparse(codes, f, xn_ND), x_ND)


class AtSite:
    """A crosscoder's form as it stands for one of its sites: f of all of them, and its part of x_hat.

    reads: the names of all its sites, in the order in which it takes their rows side by side.
    """

    def __init__(self, form: InferenceForm, part: int, reads: Sequence[str]) -> None:
        assert form.sae.site_widths is not None
        self.form, self.reads = form, tuple(reads)
        self.name, self.needs_whole_batch = form.name, form.needs_whole_batch
        begin = sum(form.sae.site_widths[:part])
        self.entries = slice(begin, begin + form.sae.site_widths[part])

    @property
    def sae(self) -> SAE:
        """Return the crosscoder."""
        return self.form.sae

    def run(self, x_ND: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N E"]]:
        """Give f and the site's part of x_hat, of the rows of all sites."""
        f_NF, x_hat_ND = self.form.run(x_ND)
        return f_NF, x_hat_ND[:, self.entries]


def form_of(sae: SAE, name: str) -> InferenceForm:
    """Give the SAE in the form of that name; the two are one for variants that do not select over a batch."""
    assert name in (SHIPPED, BATCH), name
    if name == BATCH and isinstance(sae, BatchTopKBase):
        return BatchForm(sae)
    return OwnForm(sae)


def as_form(sae: SAE | InferenceForm) -> InferenceForm:
    """Let an SAE stand for its own form."""
    return OwnForm(sae) if isinstance(sae, SAE) else sae
