"""A pass over the cache under Lightning: every batch goes to each of the SAEs that are trained side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any

from pytorch_lightning import LightningModule
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from data.base.errors import UserError
from data.loading.loader import ActivationLoader
from train.sae import Batch
from train.sae.metrics import held_out
from train.sae.sparse.product import float32_products
from train.sae_trainer import SAETrainer, State


class OwnReduction(DDPStrategy):
    """Ranks that average the gradients of each SAE themselves: DDP's wrapper expects one backward a batch."""

    def configure_ddp(self) -> None:
        """Leave the module unwrapped."""


class Passes:
    """The batches of steps `start` to `stop` of a run, over as many passes of the loader as they take.

    The loader is made when the ranks are known; `order` is a state of it whose order must be the same.
    """

    def __init__(self, make: Callable[[], ActivationLoader], start: int, stop: int, order: State | None = None) -> None:
        assert start <= stop
        self.make, self.start, self.stop, self.order = make, start, stop, order

    @cached_property
    def loader(self) -> ActivationLoader:
        return self.make()

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[Tensor]:
        # The checkpoint's own order goes in, so that the loader itself refuses to go on in another (a larger store,
        # another seed).
        order = self.loader.state_dict() if self.order is None else self.order
        self.loader.load_state_dict({**order, **self._place(self.start)})
        at = self.start
        while at < self.stop:
            for batch in self.loader:
                yield batch
                at += 1
                if at == self.stop:
                    return

    def state(self, step: int) -> State:
        """Return the loader's state after the batch of step `step`, however many have been asked for since."""
        return {**self.loader.state_dict(), **self._place(step)}

    def _place(self, step: int) -> dict[str, int]:
        # From the step alone, not from what the loader has handed out: Lightning asks for a batch ahead of the one it
        # trains on.
        epoch, delivered = divmod(step, len(self.loader))
        return {"epoch": epoch, "delivered": delivered}


class MultiSAEModule(LightningModule):
    """Members that read one stream of batches; alone or among others, each goes the same way.

    The members' optimizers are stepped here one after another, so one step's activations and gradients are held at a
    time. A member whose checkpoint lies ahead waits for its step; one whose loss is not finite is stopped, and the
    others go on.
    """

    def __init__(
        self,
        members: Sequence[SAETrainer],
        stream: Passes,
        model_units: Callable[[Tensor], Batch],
        *,
        validate_every: int,
        held_out_rows: Callable[[], Iterable[Tensor]] | None,
    ) -> None:
        super().__init__()
        # One batch, many optimizers, each with a rule of its own for when it steps: Lightning's automatic loop has one.
        self.automatic_optimization = False
        self.members = list(members)
        self.parts = nn.ModuleList(members)  # what Lightning moves to the device
        self.stream, self.step, self.model_units = stream, stream.start, model_units
        self.validate_every, self.make_rows = validate_every, held_out_rows

    @property
    def total(self) -> int:
        """Return the steps of the whole run."""
        return self.stream.stop

    @cached_property
    def held_out_rows(self) -> Iterable[Tensor] | None:
        """Return batches of held-out rows, as often as they are iterated; None where the run has none."""
        return self.make_rows and self.make_rows()

    @property
    def running(self) -> list[SAETrainer]:
        """Return the members that have not failed."""
        return [member for member in self.members if member.failure is None]

    @property
    def in_step(self) -> list[SAETrainer]:
        """Return those of them that have done as many steps as the stream."""
        return [member for member in self.running if member.step == self.step]

    def configure_optimizers(self) -> Any:
        for member in self.members:
            member.begin(self.device)
        return [member.optimizer for member in self.members]

    def on_train_end(self) -> None:
        for member in self.members:
            member.drop_graphs()  # Lightning moves the module to the CPU next

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        # Decoded once for all members; the copies that a step makes of it are its own.
        decoded = self.model_units(batch)
        for member in self.in_step:
            self.guarded(member, partial(member.training_step, *decoded))
        self.step += 1
        # Not Lightning's validation loop, which counts batches since this process began: a resumed run validates at the
        # steps of the run. The same code scores the SAEs once more after calibration, outside of a fit.
        if self.step % self.validate_every == 0:
            self.validate("val")
        if not self.running:
            self.trainer.should_stop = True

    def guarded(self, member: SAETrainer, act: Callable[[], None]) -> None:
        """Do `act`; a member that it fails is stopped and named."""
        try:
            act()
        except UserError as error:
            member.fail(str(error))
            if len(self.members) > 1 and self.trainer.is_global_zero:
                others = len(self.running)
                print(f"{member.name} is stopped, {others} go on: {error}", file=sys.stderr)

    def validate(self, prefix: str) -> None:
        """Score the members on the held-out rows, where there are any; `prefix` is that of their logged names."""
        members = self.in_step
        if self.held_out_rows is None or not members:
            return
        rows = (self.model_units(batch.to(self.device, non_blocking=True)) for batch in self.held_out_rows)
        with ExitStack() as shipping:
            shipping.enter_context(float32_products())
            for member in members:
                shipping.enter_context(member.swapped_in())
            # One pass over the held-out rows for all of them, which reading from a disk would else repeat for each.
            found = held_out([m.sae for m in members], rows, self.device, members[0].data)
        for member, values in zip(members, found, strict=True):
            member.validated(prefix, values)
