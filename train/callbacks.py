"""What watches a training run: its checkpoint, its progress lines."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer

from train.lit import LitSAE


class DurableCheckpoints(TorchCheckpointIO):
    """A checkpoint is whole or the one before stands: written beside its place, synced, renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        with beside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


class LastCheckpoint(Callback):
    """Writes one file, `path`, every `every` steps and after the last; refuses to keep a state that is not finite."""

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps:
            assert isinstance(module, LitSAE)
            module.check_finite()
            trainer.save_checkpoint(self.path)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress(Callback):
    """Tokens, rate, time left, the last logged figures: one line rewritten on a terminal, else some ten lines."""

    def __init__(self, label: str, tokens_a_step: int, stream: TextIO | None = None) -> None:
        self.label = label
        self.tokens_a_step = tokens_a_step
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.shown_at = 0.0
        self.shown_tenth = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.began_at, self.began_step = time.monotonic(), trainer.global_step
        self.shown_at = self.began_at
        self.shown_tenth = 10 * trainer.global_step // trainer.max_steps

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        step, now = trainer.global_step, time.monotonic()
        tenth = 10 * step // trainer.max_steps
        due = now - self.shown_at > (0.5 if self.live else 60) or (not self.live and tenth > self.shown_tenth)
        if not (due or step == trainer.max_steps) or not trainer.is_global_zero:
            return
        assert isinstance(module, LitSAE)
        self.shown_at, self.shown_tenth = now, tenth
        text = self.line(step, trainer.max_steps, now - self.began_at, module.figures_logged)
        end = "\n" if not self.live or step == trainer.max_steps else ""
        self.stream.write(("\r\033[K" if self.live else "") + text + end)
        self.stream.flush()

    def line(self, step: int, total: int, seconds: float, logged: dict[str, float]) -> str:
        """`step` of `total`, `seconds` since this process began; `logged` are a step's figures."""
        rate = (step - self.began_step) / max(seconds, 1e-9)
        left = "" if step == total else f"  ETA {clock((total - step) / max(rate, 1e-9))}"
        tokens = f"{step * self.tokens_a_step:,}/{total * self.tokens_a_step:,} tokens"
        figures = "".join(f"  {name} {logged[name]:.4g}" for name in ("nmse", "l0", "dead") if name in logged)
        return f"{self.label}  {step / total:4.0%}  {tokens}  {rate * self.tokens_a_step:,.0f} tokens/s{left}{figures}"

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self.live:
            self.stream.write("\n")
