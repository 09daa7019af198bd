"""BatchTopK, and what it shares with Matryoshka: the batch form in training, a threshold when it ships."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.errors import UserError
from train.sae.base import Step
from train.sae.calibrate import Calibration, calibrate, running_mean_
from train.sae.encode import Codes
from train.sae.select import Above, TopOfBatch
from train.sae.topk import TopKFamily

_DECAY = 0.999


class BatchSelected(TopKFamily):
    """Training: f = relu of the k * B largest z of the batch. Shipping: f = relu(z) 1[z > T].

    Buffers: `threshold` T, `threshold_weight` (1 - decay^n of its running mean), `skipped_batches` (fewer than k * B
    positives, not in the mean). T starts from the first sample, follows the training batches and is settled by
    `calibrate`.
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
        )
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))
        self.register_buffer("skipped_batches", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def reconstruct(
        self, codes: Codes, xn_BD: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "B D"]]:
        """The reconstruction's term of the loss, the full width's NMSE, and the full width's x_hat'."""

    def active(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        codes, _ = self.encoded(xn_BD, Above(self.threshold))
        return codes, torch.where(codes.values > self.threshold, codes.values, 0.0)

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
    ) -> Step:
        wanted = self.k * len(xn_BD)
        codes, aside = self.with_dead(xn_BD, TopOfBatch(wanted), dead_F, among_d)
        reconstruction, nmse, xn_hat_BD = self.reconstruct(codes, xn_BD)
        auxk = self.auxk(aside, (xn_BD - xn_hat_BD).detach())
        parts = {
            "nmse": nmse.detach(),
            "l0": codes.l0(codes.values),
            "auxk": auxk.detach(),
            "min_kept": codes.values.detach().min() if len(codes.values) == wanted else nmse.new_zeros(()),
        }
        return Step(reconstruction + auxk, parts, codes.of(codes.values), xn_hat_BD.detach())

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        smallest = step.parts["min_kept"]
        running_mean_(self.threshold, self.threshold_weight, smallest, _DECAY)
        self.skipped_batches += smallest <= 0

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        self.threshold.copy_(self.loss(xn_ND[:1024]).parts["min_kept"])

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Float[Tensor, "_ D"]]) -> Calibration:
        """Settle T with frozen weights on batches (model units, of the training batch size) not used in training."""
        if not batches:
            raise UserError(
                "the threshold is calibrated on reserved training batches, and there are none: set calibration_tokens"
            )
        found = calibrate(lambda x_BD: self.pre_activation(self.norm.normalise(x_BD)), batches, self.k)
        self.threshold.fill_(found.threshold)
        return found


class BatchTopK(BatchSelected):
    """f = relu of the k * B largest z of the batch; loss = NMSE + AuxK. Bussmann et al. 2412.06410.

    When it ships f = relu(z) 1[z > T], T the mean over batches of the smallest positive value kept.
    """

    name = "batchtopk"

    def reconstruct(
        self, codes: Codes, xn_BD: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "B D"]]:
        xn_hat_BD = self.decoded(codes, codes.values)
        nmse = self.nmse(xn_hat_BD, xn_BD)
        return nmse, nmse, xn_hat_BD
