"""BatchTopK, and what it shares with Matryoshka: the batch's largest in training, a threshold in the inference form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from data.base.errors import UserError
from train.sae.config import AuxKConfig
from train.sae.parts.dense import largest_of_the_batch
from train.sae.parts.groups import ALONE, RankGroup
from train.sae.parts.ranks import largest_over_ranks
from train.sae.parts.threshold import Calibration, calibrate, running_mean_
from train.sae.sparse.backend import backend_for
from train.sae.sparse.codes import Codes
from train.sae.sparse.rules import Above, Selection, TopOfBatch
from train.sae.step import PLAIN, StepOutput, TrainContext
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
    """Settings of BatchTopK and Matryoshka; `k` is a mean over tokens."""

    largest_of: Literal["rank"] | None = None
    """What the k * B largest are chosen of, where several ranks have rows of a batch: null for all of it; rank for each
    rank's own rows, which is another method and spares the ranks a few messages."""


class BatchTopKBase(TopKBase):
    """Training: f = relu of the k * B largest z of the batch, over all ranks. Inference: f = relu(z) 1[z > T].

    Buffers: `threshold` T, `threshold_weight` (1 - decay^n of its running mean), `skipped_batches` (fewer than k * B
    positives, not in the mean). T starts from the first sample, follows the training batches and is settled by
    `calibrate`.
    """

    needs_calibration = True
    config: BatchTopKConfig

    threshold: Tensor
    threshold_weight: Tensor
    skipped_batches: Tensor

    guess: Tensor | None = None  # at the next batch's smallest kept z; no part of the state, as it changes no result

    def add_state(self) -> None:
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_weight", torch.zeros(()))
        self.register_buffer("skipped_batches", torch.zeros((), dtype=torch.int64))

    def dense_encode(self, xn_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B F"]:
        z_BF = self.pre_activation(xn_BD)
        return torch.where(z_BF > self.threshold, z_BF, 0.0)

    def encode_sparse(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        # Where much of z is above, all of it comes back: so the comparison is made again on what came.
        (codes,) = self.select(xn_BD, self.bias_F, [Selection(Above(self.threshold))])
        return codes, torch.where(codes.values > self.threshold, codes.values, 0.0)

    def active_batch(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Tensor]:
        """Compute codes of normalised input and f in the training form, which depend on the rest of the batch."""
        codes, _ = self._of_batch(xn_BD)
        return codes, codes.values

    def _of_batch(self, xn_BD: Float[Tensor, "B D"]) -> tuple[Codes, Float[Tensor, ""]]:
        """Choose the k * B largest of a batch that every process has, and find the smallest of them."""
        count = self.config.k * len(xn_BD)
        rule = TopOfBatch(min(count, len(xn_BD) * self.own_width))
        (codes,) = self.select(xn_BD, self.bias_F, [Selection(rule)])
        return self._of_whole(codes, count, ALONE)

    def loss(self, xn_BD: Float[Tensor, "B D"], context: TrainContext = PLAIN) -> StepOutput:
        rows = ALONE if self.config.largest_of == "rank" else context.data
        count = self.config.k * len(xn_BD) * rows.size
        alone = rows.size * self.split.size == 1
        # Of a batch over several ranks this one may have all the largest, and its own smallest is no guess at theirs.
        rule = TopOfBatch(min(count, len(xn_BD) * self.own_width), guess=self.guess if alone else None)
        codes, candidates = self.encode_with_candidates(xn_BD, rule, context)
        codes, min_kept = self._of_whole(codes, count, rows)
        target_BE = context.target_of(xn_BD)
        found = self.reconstruct(codes, xn_BD, target_BE, candidates)
        auxk = self.auxk(candidates, target_BE, found, context.data)
        metrics = {"nmse": found.nmse.detach(), "l0": self.l0(codes, codes.values), "auxk": auxk.detach()}
        f, xn_hat_BE = codes.of(codes.values), found.xn_hat_BE.detach()
        return StepOutput(found.term + auxk, metrics, f, xn_hat_BE, min_kept=min_kept)

    def _of_whole(self, codes: Codes, count: int, data: RankGroup) -> tuple[Codes, Float[Tensor, ""]]:
        """Choose the `count` largest over all processes, of those here, and find the smallest of them.

        It is 0 where fewer are positive, as the batch then says nothing of T.
        """
        if data.size * self.split.size == 1:
            z = codes.values.detach()
            # On a GPU the selection is filled up with zeros, so its minimum is 0 by itself.
            return codes, z.min() if len(z) == count else z.new_zeros(())
        assert codes.support is not None
        rows, latents_n = codes.shape[0], self.split.latent(codes.support.latents_n)
        # As one process would number the entries that has the ranks' rows one after another: by row and then latent.
        place_n = (codes.support.rows_n + data.rank * rows) * self.width + latents_n
        places = rows * data.size * self.width
        z_n = codes.values.detach()
        kept_n, min_kept = largest_over_ranks(z_n, place_n, places, count, self.mesh(data))
        return codes.kept(kept_n), min_kept

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
        _, min_kept = self._of_batch(xn_ND[:_STARTING_ROWS])
        # Without weight: the first batch of the training replaces it (`running_mean_` begins at weight 0).
        self.threshold.copy_(min_kept)

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Float[Tensor, "_ D"]], data: RankGroup = ALONE) -> Calibration:
        """Settle T with frozen weights on batches (model units, of the training batch size) not used in training.

        Each process of `data` has its part of every batch, all of them alike many rows.
        """
        if not batches:
            raise UserError(
                "the threshold is calibrated on reserved training batches, and there are none: set calibration_tokens"
            )
        # On batches of the training's size, since the k * B-th largest value of a batch depends on B; reserved ones,
        # since on batches that were trained on z is larger and T would come out too high.
        rows = ALONE if self.config.largest_of == "rank" else data
        found = calibrate(
            lambda x_BD: self.pre_activation(self.norm.normalise(x_BD)), batches, self.config.k, self.mesh(rows)
        )
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
