"""What watches a pass: the members' checkpoints, the progress lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from data.base.files import atomic_file
from train.lit import MultiSAEModule
from train.plan import LAST


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint is whole or the one before stands: written beside its place, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(state, file)


class LastCheckpoint(Callback):
    """Writes one file in each member's folder every `every` steps and after the last; none of a state not finite."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        assert isinstance(module, MultiSAEModule)
        if module.step % self.every and module.step != module.total:
            return
        for member in module.in_step:
            module.attempt(member, member.check_finite)
        for member in module.in_step if trainer.is_global_zero else []:
            write_checkpoint(member.folder / LAST, {**member.state(), "loader": module.stream.state(member.step)})
        if not module.running:
            trainer.should_stop = True


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def figures(logged: dict[str, float]) -> str:
    """The figures of a step that progress shows."""
    return "".join(f"  {name} {logged[name]:.4g}" for name in ("nmse", "l0", "dead") if name in logged)


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
        """`step` of `total`, `seconds` since this process began; `logged` are a step's figures."""
        rate = (step - self.began_step) / max(seconds, 1e-9)
        left = "" if step == total else f"  ETA {clock((total - step) / max(rate, 1e-9))}"
        tokens = f"{step * self.tokens_a_step:,}/{total * self.tokens_a_step:,} tokens"
        rate_shown = f"{rate * self.tokens_a_step:,.0f} tokens/s"
        return f"{self.label}  {step / total:4.0%}  {tokens}  {rate_shown}{left}{figures(logged)}"

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self.live:
            self.stream.write("\n")
