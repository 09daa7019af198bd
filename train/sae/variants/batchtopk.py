"""BatchTopK, and what it shares with Matryoshka: the batch form in training, a threshold when it ships."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.base.errors import UserError
from train.sae.base import StepOutput
from train.sae.parts.threshold import Calibration, calibrate, running_mean_
from train.sae.sparse.encode import Codes
from train.sae.sparse.select import Above, TopOfBatch
from train.sae.variants.topk import TopKBase

_DECAY = 0.999
_SELECTIONS = ("batch", "quantile")
_RATE = 0.02  # of a running quantile: T moves by this share of itself where L0 is 0, or 2k and more
_LEAST = 1e-4  # of sqrt(E||x'||^2): a running quantile does not fall below it, as from 0 it could not rise again


class BatchTopKBase(TopKBase):
    """Training: f = relu of the k * B largest z of the batch. Shipping: f = relu(z) 1[z > T].

    Buffers: `threshold` T, `threshold_weight` (1 - decay^n of its running mean), `skipped_batches` (fewer than k * B
    positives, not in the mean). T starts from the first sample, follows the training batches and is settled by
    `calibrate`.

    `selection=quantile` trains the form that ships, f = relu(z) 1[z > T], T a running estimate of the (1 - k / F)
    quantile of z (the future work of BatchTopK's authors): no token's f depends on the rest of its batch. After each
    step T <- T (1 + 0.02 min(L0 / k - 1, 1)), a descent of the quantile's pinball loss in steps that know no units;
    it rests where E[L0] = k. `calibrate` then takes T_k, that quantile of the calibration set.
    """

    needs_calibration = True

    threshold: Tensor
    threshold_weight: Tensor
    skipped_batches: Tensor

    def __init__(
        self,
        d_in: int,
        width: int,
        *,
        k: int,
        input_norm: str = "dataset",
        apply_b_dec_to_input: bool = True,
        auxk_alpha: float = 1 / 32,
        auxk_relu: bool = False,
        auxk_norm: str = "variance",
        auxk_k: int | None = None,
        auxk_over: str = "token",
        selection: str = "batch",
    ) -> None:
        super().__init__(
            d_in,
            width,
            k=k,
            input_norm=input_norm,
            apply_b_dec_to_input=apply_b_dec_to_input,
            auxk_alpha=auxk_alpha,
            auxk_relu=auxk_relu,
            auxk_norm=auxk_norm,
            auxk_k=auxk_k,
            auxk_over=auxk_over,
        )
        if selection not in _SELECTIONS:
            raise UserError(f"selection={selection!r} is unknown: choose one of {', '.join(_SELECTIONS)}")
        self.selection = selection
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))
        self.register_buffer("skipped_batches", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def reconstruct(
        self, codes: Codes, f: Tensor, xn_BD: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "B D"]]:
        """The reconstruction's term of the loss, the full width's NMSE, and the full width's x_hat'."""

    def active(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        codes, _ = self.encoded(xn_BD, Above(self.threshold))
        return codes, self._above(codes)

    def _above(self, codes: Codes) -> Tensor:
        return torch.where(codes.values > self.threshold, codes.values, 0.0)

    def active_batch(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        """Codes of normalised input and their f in the training form, which depend on the rest of the batch."""
        codes, _ = self.encoded(xn_BD, TopOfBatch(self.k * len(xn_BD)))
        return codes, codes.values

    def loss(
        self,
        xn_BD: Float[Tensor, "B D"],
        *,
        dead_F: Bool[Tensor, " F"] | None = None,
        among_d: Int[Tensor, " d"] | None = None,
        sparsity_scale: float = 1.0,
    ) -> StepOutput:
        wanted, by_batch = self.k * len(xn_BD), self.selection == "batch"
        selector = TopOfBatch(wanted) if by_batch else Above(self.threshold)
        codes, aside = self.with_dead(xn_BD, selector, dead_F, among_d)
        f = codes.values if by_batch else self._above(codes)
        reconstruction, nmse, xn_hat_BD = self.reconstruct(codes, f, xn_BD)
        auxk = self.auxk(aside, (xn_BD - xn_hat_BD).detach())
        parts = {"nmse": nmse.detach(), "l0": codes.l0(f), "auxk": auxk.detach()}
        if by_batch:
            parts["min_kept"] = f.detach().min() if len(f) == wanted else nmse.new_zeros(())
        else:
            parts["threshold"] = self.threshold.clone()
        return StepOutput(reconstruction + auxk, parts, codes.of(f), xn_hat_BD.detach())

    @torch.no_grad()
    def after_step(self, step: StepOutput) -> None:
        if self.selection == "quantile":
            self.threshold.mul_(1 + _RATE * (step.parts["l0"] / self.k - 1).clamp_max(1))
            self.threshold.clamp_min_(_LEAST * self.mean_sq.sqrt())
            return
        smallest = step.parts["min_kept"]
        running_mean_(self.threshold, self.threshold_weight, smallest, _DECAY)
        self.skipped_batches += smallest <= 0

    def initialise(self, sample_ND: Float[Tensor, "N D"], **measured: Any) -> None:
        """As every SAE, in the batch form, which needs no threshold."""
        asked, self.selection = self.selection, "batch"
        try:
            super().initialise(sample_ND, **measured)
        finally:
            self.selection = asked

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        self.threshold.copy_(self.loss(xn_ND[:1024]).parts["min_kept"])

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Float[Tensor, "_ D"]]) -> Calibration:
        """Settle T with frozen weights on batches (model units, of the training batch size) not used in training."""
        if not batches:
            raise UserError(
                "the threshold is calibrated on reserved training batches, and there are none: set calibration_tokens"
            )
        pooled = self.selection == "quantile"
        found = calibrate(lambda x_BD: self.pre_activation(self.norm.normalise(x_BD)), batches, self.k, pooled=pooled)
        self.threshold.fill_(found.threshold)
        return found


class BatchTopK(BatchTopKBase):
    """f = relu of the k * B largest z of the batch; loss = NMSE + AuxK. Bussmann et al. 2412.06410.

    When it ships f = relu(z) 1[z > T], T the mean over batches of the smallest positive value kept.
    """

    name = "batchtopk"

    def reconstruct(
        self, codes: Codes, f: Tensor, xn_BD: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "B D"]]:
        xn_hat_BD = self.decoded(codes, f)
        nmse = self.nmse(xn_hat_BD, xn_BD)
        return nmse, nmse, xn_hat_BD
