"""BatchTopK, and what it shares with Matryoshka: the batch's largest in training, a threshold in the inference form."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from data.base.errors import UserError
from train.sae.base import PLAIN, StepOutput, TrainContext
from train.sae.config import AuxKConfig
from train.sae.parts.dense import largest_of_the_batch
from train.sae.parts.ranks import largest_over_ranks
from train.sae.parts.threshold import Calibration, calibrate, running_mean_
from train.sae.sparse.backend import backend_for
from train.sae.sparse.codes import Codes
from train.sae.sparse.rules import Above, Selection, TopOfBatch
from train.sae.variants.topk_base import TopKBase

_DECAY = 0.999  # of the running mean that the threshold follows
_RISE = 1.01  # of the guess in a step, at most
_STARTING_ROWS = 1024  # tokens that the first threshold is read off


def _next_guess(guess: Tensor | None, min_kept: Tensor) -> Tensor:
    """Guess the next batch's smallest kept z: it falls at once with the last one, and rises slowly.

    Too high a guess costs a further product, one that is too low next to nothing.
    """
    if guess is None or not bool(guess > 0):
        return min_kept
    return torch.minimum(min_kept, _RISE * guess)


class BatchTopKConfig(AuxKConfig):
    """Settings of BatchTopK; `k` is a mean over tokens."""


class BatchTopKBase(TopKBase):
    """Training: f = relu of the k * B largest z of the batch, over all ranks. Inference: f = relu(z) 1[z > T].

    Buffers: `threshold` T, `threshold_weight` (1 - decay^n of its running mean), `skipped_batches` (fewer than k * B
    positives, not in the mean). T starts from the first sample, follows the training batches and is settled by
    `calibrate`.
    """

    needs_calibration = True

    threshold: Tensor
    threshold_weight: Tensor
    skipped_batches: Tensor

    guess: Tensor | None = None  # at the next batch's smallest kept z; no part of the state, as it changes no result

    def add_state(self) -> None:
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))
        self.register_buffer("skipped_batches", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def reconstruct(
        self, codes: Codes, f: Tensor, xn_BD: Float[Tensor, "B D"], target_BE: Float[Tensor, "B E"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "B E"]]:
        """Compute the reconstruction's term of the loss, the full width's NMSE, and the full width's x_hat'."""

    def dense_encode(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        z_BF = self.pre_activation(xn_BD)
        return torch.where(z_BF > self.threshold, z_BF, 0.0)

    def encode_sparse(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        # A GPU gives back all of z here, so the comparison is made again on what came.
        (codes,) = self.select(xn_BD, self.bias_F, [Selection(Above(self.threshold))])
        return codes, torch.where(codes.values > self.threshold, codes.values, 0.0)

    def active_batch(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        """Compute codes of normalised input and f in the training form, which depend on the rest of the batch."""
        (codes,) = self.select(xn_BD, self.bias_F, [Selection(TopOfBatch(self.config.k * len(xn_BD)))])
        return codes, codes.values

    def loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> StepOutput:
        count = self.config.k * len(xn_BD) * context.ranks
        # Of a batch over several ranks this one may have all the largest, and its own smallest is no guess at theirs.
        rule = TopOfBatch(min(count, len(xn_BD) * self.width), guess=self.guess if context.ranks == 1 else None)
        codes, candidates = self.encode_with_candidates(xn_BD, rule, context)
        f = codes.values
        if context.ranks > 1:
            kept_n, min_kept = largest_over_ranks(f.detach().flatten(), count)
            f = torch.where(kept_n.view_as(f), f, 0.0)
        else:
            # Fewer than k * B came back where fewer are positive: then the batch says nothing of T, and 0 stands for
            # that. On a GPU the selection is filled up with zeros, so its minimum is 0 by itself.
            min_kept = f.detach().min() if len(f) == count else f.detach().new_zeros(())
        target_BE = context.target_of(xn_BD)
        reconstruction, nmse, xn_hat_BD = self.reconstruct(codes, f, xn_BD, target_BE)
        auxk = self.auxk(candidates, (target_BE - xn_hat_BD).detach())
        metrics = {"nmse": nmse.detach(), "l0": codes.l0(f), "auxk": auxk.detach()}
        return StepOutput(reconstruction + auxk, metrics, codes.of(f), xn_hat_BD.detach(), min_kept=min_kept)

    @torch.no_grad()
    def after_step(self, step: StepOutput) -> None:
        assert step.min_kept is not None
        if not backend_for(step.min_kept).fixed_sizes:  # of several ranks the guess is not used
            self.guess = _next_guess(self.guess, step.min_kept)
        # So that T is usable at any step (a validation, a checkpoint, a killed run); the calibration at the end is
        # exact.
        running_mean_(self.threshold, self.threshold_weight, step.min_kept, _DECAY)
        self.skipped_batches += step.min_kept <= 0

    def start_variant(self, xn_ND: Float[Tensor, "N D"]) -> None:
        rows = xn_ND[:_STARTING_ROWS]
        # What is kept does not depend on the target.
        target_BE = rows.new_zeros(len(rows), self.d_out) if self.transcodes else None
        min_kept = self.loss(rows, TrainContext(target_BE=target_BE)).min_kept
        assert min_kept is not None
        # Without weight: the first batch of the training replaces it (`running_mean_` begins at weight 0).
        self.threshold.copy_(min_kept)

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Float[Tensor, "_ D"]]) -> Calibration:
        """Settle T with frozen weights on batches (model units, of the training batch size) not used in training."""
        if not batches:
            raise UserError(
                "the threshold is calibrated on reserved training batches, and there are none: set calibration_tokens"
            )
        # On batches of the training's size, since the k * B-th largest value of a batch depends on B; reserved ones,
        # since on batches that were trained on z is larger and T would come out too high.
        found = calibrate(lambda x_BD: self.pre_activation(self.norm.normalise(x_BD)), batches, self.config.k)
        self.threshold.fill_(found.threshold)
        return found


class BatchTopK(BatchTopKBase):
    """f = relu of the k * B largest z of the batch; loss = NMSE + AuxK. Bussmann et al. 2412.06410.

    In the inference form f = relu(z) 1[z > T], T the mean over batches of the smallest positive value kept.
    """

    name = "batchtopk"
    Config = BatchTopKConfig
    config: BatchTopKConfig

    def dense_loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> Float[Tensor, ""]:
        z_BF = self.pre_activation(xn_BD)
        f_BF = torch.where(largest_of_the_batch(z_BF, self.config.k * len(xn_BD)), z_BF.relu(), 0.0)
        xn_hat_BD = f_BF @ self.W_dec + self.beside_latents(xn_BD)
        residual_BE = context.target_of(xn_BD) - xn_hat_BD
        nmse = residual_BE.square().sum(1).mean() / self.variance
        return nmse + self.dense_auxk(z_BF, residual_BE.detach(), context)

    def reconstruct(
        self, codes: Codes, f: Tensor, xn_BD: Float[Tensor, "B D"], target_BE: Float[Tensor, "B E"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, "B E"]]:
        xn_hat_BD = self.decode_sparse(codes, f, xn_BD)
        nmse = self.nmse(xn_hat_BD, target_BE)
        return nmse, nmse, xn_hat_BD
