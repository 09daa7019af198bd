"""metrics.csv, which every run has, and a run at Weights & Biases."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from data.base.files import write_atomic

CsvRow = dict[str, str]


class CsvLogger(Logger):
    """`metrics.csv`: a row a logged step, written at once; the header grows with the names it meets.

    A run that goes on keeps the rows up to its step (Lightning's own CSVLogger deletes the file).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self.names = ["step"]
        if self.path.exists():
            self._rows()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings stand in the run's config.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": str(step), **{name: f"{value:.7g}" for name, value in metrics.items()}}
        fresh = [name for name in row if name not in self.names]
        if fresh or not self.path.exists():
            rows = self._rows() if self.path.exists() else []
            self.names += fresh
            self._write([*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                file.write(self._lines([row]))

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Keep the rows up to and including `step`; of a run that starts at 0, none."""
        if self.path.exists():
            self._write([row for row in self._rows() if 0 < step >= int(row["step"])])

    def _rows(self) -> list[CsvRow]:
        """Read the rows on the disk, without what a killed run left of its last line."""
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole))
        self.names = list(reader.fieldnames or self.names)
        return [row for row in reader if None not in row.values() and row.get("step", "").isdecimal()]

    def _lines(self, rows: list[CsvRow], header: bool = False) -> str:
        lines = io.StringIO()
        writer = csv.DictWriter(lines, self.names)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return lines.getvalue()

    def _write(self, rows: list[CsvRow]) -> None:
        """Write the file anew, beside its place and renamed: a kill leaves the old rows or the new ones."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, self._lines(rows, header=True).encode())


class WandbRun(WandbLogger):
    """A run of one SAE at Weights & Biases, named as its folder, beside the runs of the other SAEs of its pass.

    By default wandb has one run a process, which the SAEs of a pass would share.
    """

    def __init__(self, folder: Path, project: str, offline: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder.name, folder, offline=offline, project=project, reinit="create_new")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.experiment.finish(exit_code=0 if status == "success" else 1)
