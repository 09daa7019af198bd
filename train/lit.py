"""The training step around an SAE: order of projection, clipping, step and renormalisation; bookkeeping; validation.

Letters: B tokens in a batch, D model width, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from data.errors import UserError
from train.loggers import CsvLogger
from train.sae import SAE, DeadLatents, Step
from train.sae.decoder import project_gradient_, renormalise_
from train.schedules import Schedule

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]


class HeldOut:
    """Sums over held-out tokens in float64; `values()` are ratios of the sums, never means of ratios."""

    def __init__(self, width: int, d_in: int, device: torch.device) -> None:
        at = torch.device("cpu") if device.type == "mps" else device  # Apple's devices have no float64
        self.scalars = torch.zeros(4, dtype=torch.float64, device=at)  # tokens, squared error, squared x, firings
        self.x_D = torch.zeros(d_in, dtype=torch.float64, device=at)
        self.fired_F = torch.zeros(width, dtype=torch.float64, device=at)

    def add(self, x_BD: Tensor, x_hat_BD: Tensor, f_BF: Tensor) -> None:
        at = self.x_D.device
        x_BD, x_hat_BD, active_BF = x_BD.to(at).double(), x_hat_BD.to(at).double(), f_BF.to(at) > 0
        error, square = (x_BD - x_hat_BD).square().sum(), x_BD.square().sum()
        self.scalars += torch.stack([error.new_tensor(len(x_BD)), error, square, active_BF.sum().double()])
        self.x_D += x_BD.sum(0)
        self.fired_F += active_BF.sum(0)

    def values(self) -> dict[str, float]:
        """nmse over the set (= FVU), mean l0, and latents silent over all its tokens."""
        tokens, error, square, firings = self.scalars.tolist()
        if not tokens:
            return {}
        spread = square - float(self.x_D.square().sum()) / tokens
        silent = int((self.fired_F == 0).sum())
        return {"nmse": error / spread, "l0": firings / tokens, "silent": silent, "tokens": int(tokens)}


class LitSAE(LightningModule):
    """An SAE with its optimizer, schedules and dead-latent counters.

    One step: loss, backward, the part of grad W_dec along each row removed, clipping, optimizer, rows of W_dec
    renormalised, then the counters (dead latents, the variant's own). Counters move here and nowhere else.
    """

    def __init__(
        self,
        sae: SAE,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        *,
        dead_after: int,
        clip: float | None = 1.0,
        log_every: int = 50,
    ) -> None:
        super().__init__()
        self.sae = sae
        self.dead = DeadLatents(sae.width)
        self.register_buffer("bad_step", torch.tensor(-1), persistent=False)
        self.bad_step: Tensor
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.dead_after = dead_after
        self.clip = clip
        self.log_every = log_every
        self.last: Step | None = None
        self.figures_logged: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self._rng: dict[str, Tensor] | None = None

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(self.sae.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.schedule.lr), "interval": "step"},
        }

    # The step

    def training_step(self, batch_BD: Tensor, batch_idx: int) -> Tensor:
        x_BD = batch_BD.to(self.sae.W_dec.dtype)
        dead_F = self.dead.mask(self.dead_after) if self.sae.uses_auxk else None
        scale = self.schedule.sparsity(self.global_step)
        step = self.sae.loss(self.sae.norm.normalise(x_BD), dead_F=dead_F, sparsity_scale=scale)
        bad = (self.bad_step < 0) & ~torch.isfinite(step.loss.detach())
        self.bad_step = torch.where(bad, self.global_step, self.bad_step)  # no device is waited for
        self.last = step
        return step.loss

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.sae.unit_rows:
            project_gradient_(self.sae.W_dec)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.clip)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        assert self.last is not None
        if self.sae.unit_rows:
            renormalise_(self.sae.W_dec)
        self.sae.after_step(self.last)
        fired_F, world = self.last.fired_F, self.trainer.world_size
        if world > 1:
            fired_F = self.trainer.strategy.reduce(fired_F.int(), reduce_op="max").bool()
        self.dead.update(fired_F, self.last.tokens * world)
        done = self.global_step + 1  # Lightning counts this step when the hook returns
        if done % self.log_every == 0 or done == self.trainer.max_steps:
            self.check_finite()
            self.figures_logged = self.figures(self.last)
            self._log("train", self.figures_logged, done)
        self.last = None

    def figures(self, step: Step) -> dict[str, float]:
        """What is logged of a step. Reads values from the device: called every `log_every` steps only."""
        values = {"loss": float(step.loss.detach())}
        values |= {name: float(value) for name, value in step.parts.items()}
        values["dead"] = float(self.dead.mask(self.dead_after).sum())
        values["lr"] = self.rate(self.global_step)
        return values

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        base: float = self.trainer.optimizers[0].param_groups[0]["initial_lr"]
        return base * self.schedule.lr(step)

    def check_finite(self) -> None:
        """Raises UserError naming the first step whose loss was not finite."""
        if (step := int(self.bad_step)) >= 0:
            rate = f"learning rate {self.rate(step):.2g}"
            raise UserError(
                f"the loss of variant {self.sae.name} was not finite at step {step} ({rate}): "
                "lower optimizer.lr or clip, or lengthen lr_warmup"
            )

    def _log(self, prefix: str, values: dict[str, float], step: int) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics({f"{prefix}/{name}": value for name, value in values.items()}, step)

    # Validation: the form that ships, on held-out activations

    def on_validation_epoch_start(self) -> None:
        self._held_out = HeldOut(self.sae.width, self.sae.d_in, self.device)

    def validation_step(self, batch_BD: Tensor, batch_idx: int) -> None:
        x_BD = batch_BD.to(self.sae.W_dec.dtype)
        f_BF, x_hat_BD = self.sae.run(x_BD)
        self._held_out.add(x_BD, x_hat_BD, f_BF)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            for sums in (self._held_out.scalars, self._held_out.x_D, self._held_out.fired_F):
                sums.copy_(self.trainer.strategy.reduce(sums, reduce_op="sum"))
        self.validation = self._held_out.values()
        assert all(map(math.isfinite, self.validation.values())) or int(self.bad_step) >= 0
        self._log("val" if self.trainer.state.fn == TrainerFn.FITTING else "final", self.validation, self.global_step)

    # Going on

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint["rng"]

    def on_train_start(self) -> None:
        if self._rng is not None:  # last of all that is restored: nothing before the first step may draw
            torch.set_rng_state(self._rng["cpu"].cpu())
            if "cuda" in self._rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng["cuda"].cpu(), self.device)
        for logger in self.trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.cut(self.global_step)
