"""What watches a pass: the members' checkpoints, the progress lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer

from data.base.clock import clock
from data.base.files import atomic_file
from train.lit import MultiSAEModule
from train.resume import LAST, checkpoint_seal
from train.sae_trainer import SAETrainer, State
from train.shards import SHARDS, divide, remove_others
from train.signals import Signals

_AGREE_EVERY = 10  # steps: ranks must stop and save at the same one, and asking each other costs a message


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside its place, sync and rename it: it is whole, or the one before stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(state, file)


def save_state(member: SAETrainer, state: State) -> None:
    """Write the checkpoint of a member: by the first of its processes, or each its part of a split dictionary."""
    split = member.sae.split
    if member.data.rank:  # another has the same
        return
    index, path = state, member.folder / LAST
    if split.size > 1:
        index, part = divide(state, split)
        write_checkpoint(path.with_name(index[SHARDS][split.rank]), part)
        # The index names files that are there, on every host: it is written once all parts are.
        split.sum_(torch.zeros((), device=member.bad_step.device))
    if split.rank == 0:
        write_checkpoint(path, index)
        remove_others(path.parent, index.get(SHARDS, []))


class LastCheckpoint(Callback):
    """Saves each member in its folder every `every` steps or `minutes`, after the last step and on a signal.

    None is written of a state that is not finite.
    """

    def __init__(self, every: int, minutes: float | None = None, signals: Signals | None = None) -> None:
        self.every = every
        self.seconds = None if minutes is None else 60 * minutes
        self.signals = signals or Signals()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_at = time.monotonic()
        self.signals.install()
        self.signals.deferring = True

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        assert isinstance(module, MultiSAEModule)
        stop, due = self._agreed(trainer, module.step)
        if stop or due or module.step % self.every == 0 or module.step == module.total:
            self._save(trainer, module)
        if stop or not module.running:
            trainer.should_stop = True

    def _save(self, trainer: Trainer, module: MultiSAEModule) -> None:
        for member in module.in_step:
            # Before anything is written: a checkpoint of weights that are NaN would replace the last good one.
            module.guarded(member, member.check_finite)
        for member in module.in_step:
            state = {**member.state(), "loader": module.stream.state(member.step)}
            save_state(member, {**state, "seal": checkpoint_seal(state)})
        self.saved_at = time.monotonic()

    def _agreed(self, trainer: Trainer, step: int) -> tuple[bool, bool]:
        """Decide whether to stop, and whether a checkpoint is due by time;
        alike on every rank, so asked at the same step."""
        stop = self.signals.received is not None
        due = self.seconds is not None and time.monotonic() - self.saved_at >= self.seconds
        if trainer.world_size == 1:
            return stop, due
        if step % _AGREE_EVERY:
            return False, False
        both = torch.tensor([int(stop), int(due)], device=trainer.strategy.root_device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return bool(both[0]), bool(both[1])


def figures(logged: dict[str, float]) -> str:
    """Return the figures of a step that progress shows."""
    return "".join(f"  {name} {logged[name]:.4g}" for name in ("nmse", "l0", "dead") if name in logged)


# Not Lightning's bar or a plain tqdm: both write "\\r" lines into a log file that nobody watches live, know nothing of
# steps taken before this process began, and have one line where the SAEs of a pass have one each.
class Progress(Callback):
    """Tokens, rate, time left, the last logged figures: one line rewritten on a terminal, else some ten lines.

    Where several SAEs share the pass, the figures of each follow in lines of their own at every tenth.
    """

    def __init__(self, label: str, tokens_a_step: int, stream: TextIO | None = None) -> None:
        self.label = label
        self.tokens_a_step = tokens_a_step
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.shown_at = 0.0
        self.shown_tenth = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, MultiSAEModule)
        self.began_at, self.began_step = time.monotonic(), module.step
        self.shown_at = self.began_at
        self.shown_tenth = 10 * module.step // module.total

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        assert isinstance(module, MultiSAEModule)
        step, total, now = module.step, module.total, time.monotonic()
        last, tenth = step == total, 10 * step // total > self.shown_tenth
        # A terminal is rewritten twice a second; a log file gets a line a minute, or each tenth.
        due = now - self.shown_at > (0.5 if self.live else 60) or (tenth and not self.live)
        several = len(module.members) > 1
        if not (due or last or (tenth and several)) or not trainer.is_global_zero:
            return
        alone = {} if several else module.members[0].figures_logged
        text = self.line(step, total, now - self.began_at, alone)
        shown = module.in_step if several and (tenth or last) else []
        table = [f"  {member.name}{figures(member.figures_logged)}" for member in shown if member.figures_logged]
        self.shown_at, self.shown_tenth = now, 10 * step // total
        end = "\n" if not self.live or last or table else ""
        self.stream.write(("\r\033[K" if self.live else "") + text + end + "".join(f"{row}\n" for row in table))
        self.stream.flush()

    def line(self, step: int, total: int, seconds: float, logged: dict[str, float]) -> str:
        """Write the line of `step` of `total`, `seconds` since this process began; `logged` are a step's figures."""
        rate = (step - self.began_step) / max(seconds, 1e-9)
        left = "" if step == total else f"  ETA {clock((total - step) / max(rate, 1e-9))}"
        tokens = f"{step * self.tokens_a_step:,}/{total * self.tokens_a_step:,} tokens"
        rate_shown = f"{rate * self.tokens_a_step:,.0f} tokens/s"
        return f"{self.label}  {step / total:4.0%}  {tokens}  {rate_shown}{left}{figures(logged)}"

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self.live:
            self.stream.write("\n")
