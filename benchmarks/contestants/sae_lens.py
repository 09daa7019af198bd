"""SAELens: its training SAEs under its SAETrainer, a step called as `fit` calls it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from benchmarks.contestants.spec import LONG_SILENT, LR, SELECTING, Contestant, Spec, level, mean_l0

_CLASSES: dict[str, tuple[Any, Any]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    "relu": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}
_BIAS = {"relu": "b_enc", "gated": "b_gate"}


def build(spec: Spec, *, sparse: bool, **settings: Any) -> Any:
    """Build the training SAE with its defaults, but for `settings`.

    `sparse`: TopK's sparse activations, without the decoder's norms, with which its backward fails on a CPU.
    """
    cls, config = _CLASSES[spec.variant]
    wanted: dict[str, Any] = settings | ({"k": spec.k} if spec.variant in SELECTING else {})
    if sparse:
        wanted |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
    if spec.variant == "matryoshka":
        wanted["matryoshka_widths"] = spec.prefixes
    return cls(config(d_in=spec.d_model, d_sae=spec.width, device=spec.device, **wanted))


def _no_data() -> Iterator[Tensor]:
    yield from ()


class SAELens:
    def __init__(self, spec: Spec, sample_BD: Tensor, *, sparse: bool) -> None:
        self.spec = spec
        self.sae = build(spec, sparse=sparse)
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=spec.batch,
            lr=LR,
            lr_end=LR / 10,
            device=spec.device,
            autocast=spec.precision == "bf16",
        )
        self.trainer = SAETrainer(config, self.sae, _no_data())
        self._silence(sample_BD[:256])
        self.output: Any = None

    @torch.no_grad()
    def _silence(self, sample_BD: Tensor) -> None:
        index = self.spec.dead_latents()
        self.sae.W_enc[:, index] *= 0.01
        self.trainer.n_forward_passes_since_fired[index] = LONG_SILENT
        if self.spec.variant not in SELECTING:
            z_BF = self.sae.process_sae_in(sample_BD) @ self.sae.W_enc
            at = level(z_BF, self.spec.l0)
            if self.spec.variant == "jumprelu":
                self.sae.threshold.fill_(at)
            else:
                self.sae.get_parameter(_BIAS[self.spec.variant]).sub_(at)

    def step(self, x_BD: Tensor) -> None:
        self.output = self.trainer.step(x_BD)  # kept until the next is there, as in `fit`
        self.trainer.n_training_steps += 1

    def facts(self, x_BD: Tensor) -> dict[str, float]:
        f_BF, losses = self.output.feature_acts, self.output.losses
        auxk = losses["auxiliary_reconstruction_loss"] if self.spec.variant in SELECTING else 0.0
        dense_BF = f_BF.to_dense() if f_BF.is_sparse else f_BF
        return {"l0": mean_l0(dense_BF), "dead": float(self.trainer.dead_neurons.sum()), "auxk": float(auxk)}


def make(name: str, spec: Spec, sample_BD: Tensor) -> Contestant:
    return SAELens(spec, sample_BD, sparse=name == "sae-lens-sparse")
