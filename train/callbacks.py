"""What watches a pass: the members' checkpoints, the progress lines."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer

from data.base.files import atomic_file
from data.base.logs import CLEAR
from data.base.progress import LINES, Parts, progress_line
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


FIGURES = ("loss", "nmse", "l0", "dead", "lr")  # of a step, that progress shows
MOST_LINES = 30  # of one pass, where nobody watches


def figures(logged: dict[str, float]) -> str:
    """Return the figures of a step that progress shows."""
    return "".join(f"  {name} {logged[name]:.4g}" for name in FIGURES if name in logged)


def figures_table(members: Sequence[tuple[str, dict[str, float]]], most: int) -> list[str]:
    """Write the figures of several SAEs, given by name, in columns below each other; at most `most` lines."""
    names = [name for name in FIGURES if any(name in logged for _, logged in members)]
    lines = [["SAE", *names]]
    lines += [[name, *(f"{logged[key]:.4g}" if key in logged else "" for key in names)] for name, logged in members]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  " + "  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in _cells(line, widths))])
        for line in lines
    ]
    if len(rows) > most:
        rows = [*rows[: most - 1], f"  and {len(rows) - most + 1} more"]
    return rows


def _cells(line: Sequence[str], widths: Sequence[int]) -> list[tuple[str, int]]:
    return list(zip(line[1:], widths[1:], strict=True))


# Not Lightning's bar or a plain tqdm: both write "\\r" lines into a log file that nobody watches live, know nothing of
# steps taken before this process began, and have one line where the SAEs of a pass have one each.
class Progress(Callback):
    """Tokens, rate, time left and the figures of each SAE of the pass.

    On a terminal they are rewritten in place: one line, or a table where several SAEs share the pass. Elsewhere plain
    lines are written, at most MOST_LINES of them.
    """

    def __init__(self, label: str, tokens_a_step: int, stream: TextIO | None = None) -> None:
        self.label = label
        self.tokens_a_step = tokens_a_step
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.shown_at = 0.0
        self.drawn = 0  # lines of the table that stands on the terminal
        self.running = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, MultiSAEModule)
        self.began_at, self.began_step = time.monotonic(), module.step
        self.shown_at = self.began_at
        self.parts = Parts(self._parts(module), module.step, module.total)
        self.running = len(module.in_step)

    def _parts(self, module: MultiSAEModule) -> int:
        """Return at how many equal steps plain lines are written: ten, or fewer where there are many SAEs."""
        if len(module.members) == 1:
            return LINES
        return max(1, min(LINES, MOST_LINES // (2 + len(module.members))))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        assert isinstance(module, MultiSAEModule)
        step, total, now = module.step, module.total, time.monotonic()
        last = step == total
        # A terminal is rewritten twice a second.
        due = now - self.shown_at > 0.5 if self.live else self.parts.due(step, total)
        if not (due or last) or not trainer.is_global_zero:
            return
        self.shown_at = now
        several = len(module.members) > 1
        text = self.line(step, total, now - self.began_at, {} if several else module.members[0].figures_logged)
        # SAEs that have stopped or wait for their step have no figures of this one.
        shown = [(member.name, member.figures_logged) for member in module.in_step if member.figures_logged]
        if several:
            self._write_table(text, shown, len(module.in_step))
        elif self.live:
            self.stream.write(f"\r{CLEAR}{text}" + ("\n" if last else ""))
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()

    def _write_table(self, text: str, shown: Sequence[tuple[str, dict[str, float]]], running: int) -> None:
        size = shutil.get_terminal_size()
        rows = figures_table(shown, size.lines - 2 if self.live else MOST_LINES - 1) if shown else []
        if not self.live:
            self.stream.write("".join(f"{line}\n" for line in (text, *rows)))
            return
        # What was printed since, of an SAE that stopped, must not be drawn over: the table begins anew below it.
        up = f"\033[{self.drawn}A" if self.drawn and running == self.running else ""
        lines = [f"\r{CLEAR}{line[: size.columns - 1]}\n" for line in (text, *rows)]
        self.stream.write(up + "".join(lines))
        self.drawn, self.running = len(lines), running

    def line(self, step: int, total: int, seconds: float, logged: dict[str, float]) -> str:
        """Write the line of `step` of `total`, `seconds` since this process began; `logged` are a step's figures."""
        rate = (step - self.began_step) / max(seconds, 1e-9)
        done, all_tokens = step * self.tokens_a_step, total * self.tokens_a_step
        return progress_line(self.label, done, all_tokens, rate * self.tokens_a_step, "tokens") + figures(logged)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if self.live and not self.drawn:
            self.stream.write("\n")
