"""EleutherAI's sparsify: its SparseCoder and its optimizers, in the order in which its Trainer runs them.

Its Trainer steps inside a language model's hooks, so its calls stand here. On a GPU its forward casts to bfloat16
whatever is asked for; for an equal precision that is switched off unless bf16 is what is compared.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.contestants.spec import AUXK, LONG_SILENT, LR, Contestant, Spec

_DEAD_AFTER = 10_000_000


def coder(spec: Spec) -> Any:
    with patch("torch.cuda.is_bf16_supported", return_value=spec.precision == "bf16"):  # read by a decorator on import
        from sparsify.sparse_coder import SparseCoder, SparseCoderConfig
    return SparseCoder(spec.d_model, SparseCoderConfig(num_latents=spec.width, k=spec.k), spec.device, torch.float32)


def optimizer(name: str, sae: Any) -> tuple[Any, Any]:
    """Return its default (sign descent with momentum, schedule-free), or its Adam with a schedule."""
    if name == "sparsify":
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        signum = ScheduleFreeWrapper(SignSGD([{"params": sae.parameters(), "lr": LR}]), momentum=0.95)
        signum.train()
        return signum, None
    from transformers import get_linear_schedule_with_warmup

    adam = torch.optim.Adam([{"params": sae.parameters(), "lr": LR}])
    return adam, get_linear_schedule_with_warmup(adam, 0, 10**9)


class Sparsify:
    def __init__(self, name: str, spec: Spec, sample_BD: Tensor) -> None:
        self.spec, self.sae = spec, coder(spec)
        self.sae.b_dec.data = sample_BD.mean(0)
        self.since_F = torch.zeros(spec.width, device=spec.device, dtype=torch.long)
        self.fired_F = torch.zeros(spec.width, device=spec.device, dtype=torch.bool)
        index = spec.dead_latents()
        self.sae.encoder.weight.data[index] *= 0.01
        self.since_F[index] = LONG_SILENT
        self.optimizer, self.schedule = optimizer(name, self.sae)
        self.told = {"fvu": 0.0, "auxk": 0.0}
        self.l0 = torch.zeros(())

    def step(self, x_BD: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        dead_F = self.since_F > _DEAD_AFTER
        total_variance = (x_BD - x_BD.mean(0)).pow(2).sum()
        out = self.sae(x=x_BD, y=x_BD, dead_mask=dead_F, total_variance=total_variance)
        self.fired_F[out.latent_indices.flatten()] = True
        self.told = {"fvu": float(out.fvu.detach()), "auxk": float(out.auxk_loss.detach())}
        loss = out.fvu + AUXK * out.auxk_loss + out.multi_topk_fvu / 8
        loss.div(1).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        with torch.no_grad():
            self.since_F += len(x_BD)
            self.since_F[self.fired_F] = 0
            self.fired_F.zero_()

    @torch.no_grad()
    def facts(self, x_BD: Tensor) -> dict[str, float]:
        values = self.sae.encode(x_BD).top_acts
        dead = float((self.since_F > _DEAD_AFTER).sum())
        return {"l0": float((values > 0).sum() / len(x_BD)), "dead": dead, "auxk": self.told["auxk"]}


def make(name: str, spec: Spec, sample_BD: Tensor) -> Contestant:
    return Sparsify(name, spec, sample_BD)
