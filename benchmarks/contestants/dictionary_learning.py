"""dictionary_learning: its trainers, a step called as `trainSAE` calls it.

`repaired`: the parallel part of the decoder's gradient is taken by elementwise product and sum. As shipped an einsum
does it, which on a CPU becomes F small products.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor

from benchmarks.contestants.spec import LONG_SILENT, LR, PREFIXES, SELECTING, Contestant, Spec, level, mean_l0

TRAINERS: dict[str, Any] = {
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "relu": StandardTrainerAprilUpdate,
    "gated": GatedSAETrainer,
    "jumprelu": JumpReluTrainer,
}
_STEADY = 5000  # the first step: warm-ups over, the threshold followed


@torch.no_grad()
def elementwise(W_DF: Tensor, grad_DF: Tensor, activation_dim: int, d_sae: int) -> Tensor:
    """Return its remove_gradient_parallel_to_decoder_directions without the einsum."""
    unit_DF = W_DF / (torch.norm(W_DF, dim=0, keepdim=True) + 1e-6)
    grad_DF -= (grad_DF * unit_DF).sum(0) * unit_DF
    return grad_DF


class DictionaryLearning:
    def __init__(self, spec: Spec, sample_BD: Tensor, *, repaired: bool) -> None:
        self.spec, self.at = spec, _STEADY
        trainer = TRAINERS[spec.variant]
        if repaired:
            home = sys.modules[trainer.__module__]
            assert hasattr(home, "remove_gradient_parallel_to_decoder_directions")
            home.remove_gradient_parallel_to_decoder_directions = elementwise  # type: ignore[attr-defined]
        wanted: dict[str, Any] = {"k": spec.k} if spec.variant in SELECTING else {}
        if spec.variant == "matryoshka":
            wanted["group_fractions"] = [end - start for start, end in pairwise((0.0, *PREFIXES))]
        if spec.variant == "jumprelu":
            wanted["target_l0"] = spec.l0
        self.trainer = trainer(
            steps=10**9,
            activation_dim=spec.d_model,
            dict_size=spec.width,
            layer=0,
            lm_name="none",
            lr=LR,
            device=spec.device,
            **wanted,
        )
        self.ae = self.trainer.ae
        self._silence(sample_BD[:256])

    @torch.no_grad()
    def _silence(self, sample_BD: Tensor) -> None:
        index, ae = self.spec.dead_latents(), self.ae
        if hasattr(ae, "encoder"):
            ae.encoder.weight[index] *= 0.01
        else:
            ae.W_enc[:, index] *= 0.01
        if hasattr(self.trainer, "num_tokens_since_fired"):
            self.trainer.num_tokens_since_fired[index] = LONG_SILENT
        if self.spec.variant == "relu":
            ae.encoder.bias -= level(ae.encoder(sample_BD), self.spec.l0)
        elif self.spec.variant == "gated":
            ae.gate_bias -= level(ae.encoder(sample_BD), self.spec.l0)
        elif self.spec.variant == "jumprelu":
            ae.threshold.fill_(level(sample_BD @ ae.W_enc, self.spec.l0))

    def step(self, x_BD: Tensor) -> None:
        with self.spec.autocast():
            self.trainer.update(self.at, x_BD)
        self.at += 1

    @torch.no_grad()
    def facts(self, x_BD: Tensor) -> dict[str, float]:
        batch_form = self.spec.variant in ("batchtopk", "matryoshka")
        f_BF = self.ae.encode(x_BD, use_threshold=False) if batch_form else self.ae.encode(x_BD)
        silent_F = getattr(self.trainer, "num_tokens_since_fired", None)
        dead = len(self.spec.dead_latents()) if silent_F is None else float((silent_F >= 10_000_000).sum())
        return {
            "l0": mean_l0(f_BF),
            "dead": dead,
            "auxk": max(0.0, float(getattr(self.trainer, "pre_norm_auxk_loss", 0))),
        }


def make(name: str, spec: Spec, sample_BD: Tensor) -> Contestant:
    return DictionaryLearning(spec, sample_BD, repaired=name == "dictionary-learning-repaired")
