"""Our step, in the order in which train/lit.py and Lightning run it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.contestants.spec import LONG_SILENT, LR, PREFIXES, SELECTING, Contestant, Spec, level
from data.base.cli import keep_freed_memory
from train.sae import VARIANTS, DeadLatents, StepOutput, TrainContext
from train.sae.parts.unit_rows import project_gradient_, renormalise_

_DEAD_AFTER = 10_000_000
_LOOK = 50  # steps between two looks at which latents may be dead, on a GPU: log_every of conf/train.yaml


def settings(variant: str, k: int) -> dict[str, Any]:
    """Return the SAE's own settings, as conf/sae has them."""
    held = OmegaConf.to_container(OmegaConf.load(f"conf/sae/{variant}.yaml"))
    assert isinstance(held, dict)
    wanted = {str(name): value for name, value in held.items() if name not in ("variant", "width", "expansion")}
    if variant in SELECTING:
        wanted["k"] = k
    if variant == "matryoshka":
        wanted["prefixes"] = PREFIXES
    return wanted


def adam(variant: str, parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of conf/optimizer, at the benchmark's rate."""
    held = OmegaConf.load(f"conf/optimizer/{variant}.yaml").optimizer
    assert held["name"] == "adam"
    return torch.optim.Adam(parameters, lr=LR, betas=tuple(held.betas), eps=held.eps, fused=held.fused)


class Ours:
    def __init__(self, spec: Spec, sample_BD: Tensor) -> None:
        self.spec = spec
        self.sae = VARIANTS[spec.variant](spec.d_model, spec.width, **settings(spec.variant, spec.k)).to(spec.device)
        self.sae.initialise(sample_BD[:256])
        self.sae.matmul = spec.precision
        self.dead = DeadLatents(spec.width).to(spec.device)
        self._silence(sample_BD[:256])
        self.optimizer = adam(spec.variant, self.sae.parameters())
        self.last: StepOutput | None = None
        self.auxk = torch.zeros(())

    @torch.no_grad()
    def _silence(self, sample_BD: Tensor) -> None:
        """Set which latents are dead, and the activity asked for."""
        index = self.spec.dead_latents()
        self.sae.W_enc[:, index] *= 0.01
        self.dead.since_F[index] = LONG_SILENT
        if self.spec.variant not in SELECTING:
            at = level(self.sae.pre_activation(self.sae.norm.normalise(sample_BD)), self.spec.l0)
            if self.spec.variant == "jumprelu":
                self.sae.get_parameter("theta").fill_(at)
            else:
                self.sae.get_parameter(self.sae.bias_names[0]).sub_(at)

    def step(self, x_BD: Tensor) -> None:
        sae = self.sae
        context = TrainContext()
        if sae.uses_auxk:
            may_die_d = self.dead.may_die(_DEAD_AFTER, len(x_BD), _LOOK)
            context = TrainContext(self.dead.mask(_DEAD_AFTER), may_die_d)
        step = sae.loss(sae.norm.normalise(x_BD), context)
        self.optimizer.zero_grad()
        step.loss.backward()  # type: ignore[no-untyped-call]
        if sae.unit_rows:
            project_gradient_(sae.W_dec)
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        self.optimizer.step()
        if sae.unit_rows:
            renormalise_(sae.W_dec)
        sae.after_step(step)
        self.dead.update(step.fired_F, len(x_BD))
        self.auxk = step.metrics.get("auxk", self.auxk)

    def facts(self, x_BD: Tensor) -> dict[str, float]:
        with torch.no_grad():
            l0 = float(self.sae.loss(self.sae.norm.normalise(x_BD)).metrics["l0"])
        return {"l0": l0, "dead": float(self.dead.mask(_DEAD_AFTER).sum()), "auxk": float(self.auxk)}


def make(name: str, spec: Spec, sample_BD: Tensor) -> Contestant:
    keep_freed_memory()  # as every stage does at its start
    if name == "ours-bf16":
        spec = replace(spec, precision="bf16")
    return Ours(spec, sample_BD)
