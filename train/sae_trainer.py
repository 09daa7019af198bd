"""One SAE in training, in plain torch: its step, its counters, its state. One pass over the cache trains many of them.

Letters: B tokens in a batch, D model width, F latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data.base.errors import UserError
from train.cuda_graph import Clock, CudaGraph, Figures, Graph, StepGraphs, StepInputs
from train.optimizers import OptimizerFactory
from train.sae import SAE, DeadLatents, StartRows, StepOutput, TrainContext
from train.sae.parts.auxk import raise_biases
from train.sae.parts.groups import ALONE, RankGroup
from train.sae.parts.update import WeightEMA, update
from train.schedules import Schedule

if TYPE_CHECKING:
    from pytorch_lightning.loggers.logger import Logger

State = dict[str, Any]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators that a step on `device` may draw from."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave; a generator it does not hold stays as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


class SAETrainer(nn.Module):
    """An SAE with its optimizer, schedules, clip, counters, loggers and folder.

    Nothing of it is shared with the others of its pass: the random state too is its own, as if it were trained alone.
    `step` counts its steps done; `failure` is the sentence it was stopped with. Counters move in `training_step` only.
    `ema` is the decay of the mean of the weights that is saved, None for the weights themselves; `rate` a factor on the
    optimizer's learning rates; `data` the processes that have other rows of each batch; `fingerprint` that of the
    numbers of its run, which its checkpoints carry. Of a split dictionary this is the part that is here.
    """

    bad_step: Tensor

    def __init__(
        self,
        sae: SAE,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        *,
        folder: Path,
        name: str,
        seed: int,
        dead_after: int,
        clip: float | None = 1.0,
        ema: float | None = None,
        rate: float = 1.0,
        log_every: int = 50,
        data: RankGroup = ALONE,
        fingerprint: str = "",
    ) -> None:
        super().__init__()
        self.sae = sae
        self.schedule = schedule
        self.folder = folder
        self.name = name
        self.dead_after = dead_after
        self.clip = clip
        self.log_every = log_every
        self.data = data
        self.fingerprint = fingerprint
        self.dead = DeadLatents(sae.own_width)
        self.average = None if ema is None else WeightEMA(sae, ema)
        self.register_buffer("bad_step", torch.tensor(-1))
        try:
            self.optimizer = optimizer(sae.parameter_groups())
        except (TypeError, ValueError) as error:
            raise UserError(f"the optimizer refuses its settings ({error}): fix them under optimizer.*") from None
        self.rates = [rate * float(group["lr"]) * group.get("rate_share", 1.0) for group in self.optimizer.param_groups]
        self.step = 0
        self.failure: str | None = None
        self.loggers: Sequence[Logger] = ()
        self.figures_logged: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.seed = seed
        torch.manual_seed(seed)
        self.rng = random_state(torch.device("cpu"))
        self.graphs: StepGraphs | None = None
        self._moments: State | None = None
        self._asked_of: Tensor | None = None  # the list for which `_anyone` holds
        self._anyone = False

    # The step

    def training_step(self, x_BD: Tensor, target_BE: Tensor | None = None) -> None:
        """Take one step on a batch in model units, a transcoder's with its target; raise UserError where a loss was not
        finite, at a step that is logged.

        On a GPU nothing waits for the device but the steps that are logged.
        """
        may_die_d = None
        if self.sae.uses_auxk:
            tokens = len(x_BD) * self.data.size
            # The list may be made anew after half the window at the latest, so that it never holds many that live.
            may_die_d = self.dead.may_die(self.dead_after, tokens, self.dead_after // (2 * tokens))
        clock = self._clock()
        inputs = StepInputs(x_BD, target_BE, may_die_d, clock)
        if self.graphs is None:
            # Each SAE draws from a state of its own, put in before its step and taken out after it: beside others it
            # gets the numbers it would get alone. The variants that can be captured draw none.
            set_random_state(self.rng, x_BD.device)
            figures = self._take_step(inputs)
            self.rng = random_state(x_BD.device)
        else:
            figures = self.graphs(inputs, self.sae.W_dec, self.optimizer)
            self._set_rates(clock)  # a checkpoint has numbers, not the graph's tensors
        self.step += 1
        # Only here is the device waited for. A loss that is not finite is noted on the device in each step, and seen
        # here.
        if self.step % self.log_every == 0 or self.step == self.schedule.total:
            self.check_finite()
            self.figures_logged = self._read(figures)
            self.log("train", self.figures_logged)

    def use_graphs(self, make: Callable[[], Graph] = CudaGraph) -> None:
        """Take the coming steps by CUDA graphs, where `check_capturable` allows it; `make` makes an empty one."""
        self.graphs = StepGraphs(self._take_step, make)

    def drop_graphs(self) -> None:
        """Forget what was captured, as parameters or moments will lie somewhere else."""
        if self.graphs is not None:
            self.graphs.drop()

    def _clock(self) -> Clock:
        rates = [rate * self.schedule.lr(self.step) for rate in self.rates]
        gain = 1.0 if self.average is None else self.average.gain(self.step + 1)
        return Clock(self.step, rates, gain, self.schedule.sparsity(self.step), self.schedule.settled(self.step))

    def _set_rates(self, clock: Clock) -> None:
        for group, rate in zip(self.optimizer.param_groups, clock.rates, strict=True):
            group["lr"] = rate

    def _take_step(self, inputs: StepInputs) -> Figures:
        """Do all of a step that happens on the device; returns what may be logged of it.

        It may be captured: what differs from step to step comes in by `inputs`.
        """
        clock = inputs.clock
        self._set_rates(clock)
        context = TrainContext(sparsity_scale=clock.sparsity_scale, settled=clock.settled, data=self.data)
        if inputs.target_BE is not None:
            context = replace(context, target_BE=self.sae.norm_out.normalise(inputs.target_BE))
        if self.sae.uses_auxk:
            dead_F = self.dead.mask(self.dead_after)
            if self._anyone_dead(dead_F, inputs.may_die_d):
                context = replace(context, dead_F=dead_F, may_die_d=inputs.may_die_d)
        step = self.sae.loss(self.sae.norm.normalise(inputs.x_BD), context)
        step.loss.backward()  # type: ignore[no-untyped-call]
        # After backward and before the projection and the clip, which then work on the gradient of the whole batch, as
        # on one device.
        self._average_gradients()
        update(self.sae, self.optimizer, self.clip)
        self.optimizer.zero_grad()  # the next SAE's step has the memory
        self.sae.after_step(step)
        if self.sae.config.dead_raise:
            self._raise_dead()
        self._count(step, clock.step)
        if self.average is not None:
            self.average.update(self.sae, clock.gain)
        return {"loss": step.loss.detach(), **step.figures}

    def _raise_dead(self) -> None:
        sae = self.sae
        by = sae.config.dead_raise * (sae.mean_sq / sae.d_out).sqrt()
        raise_biases(map(sae.get_parameter, sae.bias_names), self.dead.mask(self.dead_after), by)

    def _anyone_dead(self, dead_F: Tensor, may_die_d: Tensor | None) -> bool:
        """Tell whether AuxK has anything to do: of a split dictionary, on any of its processes.

        All then take part in AuxK's messages, or none. On a GPU they ask each other only as the list is made anew.
        """
        split = self.sae.split
        if split.size == 1:
            return True
        if may_die_d is None or may_die_d is not self._asked_of:
            count = int(dead_F.sum()) if may_die_d is None else len(may_die_d)
            self._asked_of = may_die_d
            self._anyone = int(split.sum_(torch.tensor(count, device=dead_F.device))) > 0
        return self._anyone

    @torch.no_grad()
    def _count(self, step: StepOutput, number: int | Tensor) -> None:
        fired_F = step.fired_F
        if self.data.size > 1:
            # A latent is alive if it fired on any rank's part of the batch.
            fired_F = self.data.max_(fired_F.int()).bool()
            # Where each rank selects of its own rows the threshold follows the first one's: ranks must not drift apart,
            # and any one of them is a fair sample. Else the buffers are alike already.
            for buffer in self.sae.buffers():
                self.data.broadcast_(buffer)
        self.dead.update(fired_F, step.tokens * self.data.size)
        # Without a branch: the first bad step stays, and the host does not wait for it.
        bad = (self.bad_step < 0) & ~torch.isfinite(step.loss.detach())
        self.bad_step.masked_fill_(bad, number)

    def _average_gradients(self) -> None:
        if self.data.size > 1:
            for parameter in self.sae.parameters():
                assert parameter.grad is not None
                self.data.sum_(parameter.grad).div_(self.data.size)

    def _read(self, figures: Figures) -> dict[str, float]:
        """Read what is logged of the step just done from the device."""
        # Of the whole batch, over all ranks.
        values = {name: float(self.data.mean(value)) for name, value in figures.items()}
        values["dead"] = self.dead_count()
        values["lr"] = self.rates[0] * self.schedule.lr(self.step - 1)
        return values

    def dead_count(self) -> int:
        """Return how many latents are dead now; of a split dictionary every process asks at once."""
        return int(self.sae.split.sum_(self.dead.mask(self.dead_after).sum()))

    def check_finite(self) -> None:
        """Raise UserError naming the first step whose loss was not finite, on every rank alike."""
        self.sae.mesh(self.data).max_(self.bad_step)
        if (step := int(self.bad_step)) >= 0:
            rate = f"learning rate {self.rates[0] * self.schedule.lr(step):.2g}"
            raise UserError(
                f"the loss of variant {self.sae.name} was not finite at step {step} ({rate}): "
                "lower optimizer.lr or clip, or lengthen lr_warmup"
            )

    # What is logged of it

    def log(self, prefix: str, values: dict[str, float]) -> None:
        """Hand `values` to the loggers, under the steps done."""
        for logger in self.loggers:
            logger.log_metrics({f"{prefix}/{name}": value for name, value in values.items()}, self.step)

    def swapped_in(self) -> AbstractContextManager[None]:
        """Give the SAE for the `with` block the weights that are saved,
        where their threshold is known before the end."""
        # A threshold belongs to the weights it was measured with. Under BatchTopK's followed one the mean would be
        # scored by a threshold of other weights.
        if self.average is None or self.sae.needs_calibration:
            return nullcontext()
        return self.average.swapped_in(self.sae)

    def copy_to(self) -> None:
        """Give the SAE the weights that ship, for good."""
        if self.average is not None:
            self.average.copy_to(self.sae)

    def validated(self, prefix: str, values: dict[str, float]) -> None:
        """Take the figures on held-out tokens of the inference form."""
        assert all(map(math.isfinite, values.values())) or int(self.bad_step) >= 0
        self.validation = values
        self.log(prefix, values)

    def fail(self, why: str) -> None:
        """Stop it for good; its moments and loggers go."""
        self.failure = why
        # Adam's moments are two thirds of what an SAE holds between steps; the others of the pass may need it.
        self.optimizer.state.clear()
        self.drop_graphs()
        self.finalize("failed")

    def finalize(self, status: str) -> None:
        """Close the loggers."""
        for logger in self.loggers:
            logger.finalize(status)
        self.loggers = ()

    # Beginning and going on

    def initialise(
        self,
        sample_ND: Tensor,
        mean_sq_norm: float | Sequence[float],
        variance: float | Sequence[float],
        target: StartRows | None = None,
    ) -> None:
        """Start from data in model units and the moments of all of it, a transcoder from those of its target too, a
        crosscoder from those of each site."""
        set_random_state(self.rng, torch.device("cpu"))
        self.sae.initialise(sample_ND, mean_sq_norm=mean_sq_norm, variance=variance, seed=self.seed, target=target)
        self.rng = random_state(torch.device("cpu"))

    def state(self) -> State:
        """Return all that the next step depends on, beside the batch."""
        mean = {} if self.average is None else {"average": self.average.state_dict()}
        return mean | {
            "run": self.fingerprint,
            "step": self.step,
            "sae": self.sae.state_dict(),
            "dead": self.dead.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng,
            "figures": self.figures_logged,
        }

    def load(self, state: State) -> None:
        """Go on from `state`, or raise UserError where it is not of this SAE and its optimizer.

        The moments follow in `begin`, when it is known where they live.
        """
        try:
            self.step = state["step"]
            self.rng = state["rng"]
            self.figures_logged = state["figures"]
            self.sae.load_state_dict(state["sae"])
            self.dead.load_state_dict(state["dead"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            set_random_state(self.rng, torch.device("cpu"))
            moments = state["optimizer"]["state"]
            has_moments = "betas" in self.optimizer.param_groups[0]  # Adam's; plain SGD has none
            if has_moments and set(moments) != set(range(len(list(self.sae.parameters())))):
                raise ValueError("the optimizer's moments are of other parameters")
            self.optimizer.load_state_dict(state["optimizer"])  # a check; `begin` does it where the parameters are
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0].rstrip(":")
            raise UserError(
                f"the checkpoint in {self.folder} does not fit this run ({reason}): remove the folder and train anew"
            ) from None
        self._moments = state["optimizer"]

    def begin(self, device: torch.device) -> None:
        """Make the optimizer; to be called once the parameters are on `device`."""
        if self._moments is not None:
            # Loaded again, as load_state_dict brings the moments to where the parameters are, and they have been moved
            # since.
            self.optimizer.load_state_dict(self._moments)
            self._moments = None
        if device.type == "cuda" and "cuda" not in self.rng:
            torch.cuda.manual_seed(self.seed)
            self.rng["cuda"] = torch.cuda.get_rng_state(device)
        self.drop_graphs()
