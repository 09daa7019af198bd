"""What the claims are tried on: a model's study (conf/claims/models), and the harvests and sweeps it takes.

Each runs as the command a user would give, in a process of its own: it can be interrupted and goes on where it stood,
and one that fails leaves the others' work as it is.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from data.base.config import Real, Settings, Text, Whole
from data.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = (
    "packing.bos=context",
    "packing.keep_special=true",
)  # the post's packing: BOS before each context, and stored


class Rates(Settings):
    """Learning rates by variant; null: the variant's own (conf/optimizer)."""

    topk: Real | None = Field(None, gt=0)
    """TopK's."""
    batchtopk: Real | None = Field(None, gt=0)
    """BatchTopK's; where it is TopK's too, both train in one pass."""
    gated: Real | None = Field(None, gt=0)
    """Gated's."""
    jumprelu: Real | None = Field(None, gt=0)
    """JumpReLU's."""
    relu: Real | None = Field(None, gt=0)
    """That of Gated's baseline, ReLU with an L1."""


class Study(Settings):
    """A model and site, and what is trained on it. Widths are multiples of the site's."""

    path: Text | None = None
    """The model's folder, for `model` to refer to."""
    text: Text | None = None
    """Its text's, likewise."""
    model: tuple[Text, ...]
    """Overrides of both stages: the language model, its text and packing."""
    harvest: tuple[Text, ...] = ()
    """Overrides of the harvests alone."""
    train: tuple[Text, ...] = ()
    """Overrides of the trainings alone."""
    site: Text
    """The site of the activations."""
    rows: Whole = Field(ge=1)
    """Rows to harvest; somewhat more than tokens and calibration_tokens together."""
    tokens: Whole = Field(ge=1)
    """Training tokens of each SAE."""
    special_rows: Whole = Field(ge=1)
    """Rows of the small store that keeps BOS."""
    special_tokens: Whole = Field(ge=1)
    """Training tokens of the SAEs on it."""
    calibration_tokens: Whole = Field(65_536, ge=1)
    """Rows that training sets aside for thresholds."""
    batch: Whole = Field(1024, ge=1)
    """Tokens a step, where the batch is not what varies."""
    batches: tuple[Whole, ...] = (256, 4096)
    """Other batch sizes."""
    widths: tuple[Whole, ...] = (4, 8, 16, 32)
    """Widths of the grid."""
    width: Whole = Field(8, ge=1)
    """The width where one is fixed; one of widths."""
    widest: Whole = Field(32, ge=1)
    """The width at which dead latents are compared; one of widths."""
    k: Whole = Field(ge=1)
    """L0 where one is fixed, one of ks; near a 24th of the site's width."""
    ks: tuple[Whole, ...]
    """L0s of the grid."""
    rival_ks: tuple[Whole, ...]
    """L0s that the variants with a coefficient aim at: three or more, as curves are read between them."""
    rates: Rates = Field(default_factory=lambda: Rates.of({}))
    """Learning rates."""
    seeds: tuple[Whole, ...] = (0,)
    """Seeds of every SAE; two or more give the intervals the spread over seeds."""


@dataclass(frozen=True)
class Sweep:
    """One of the sweeps: its configuration in conf/claims, the variants it trains, and its own overrides."""

    name: str
    variants: tuple[str, ...]
    overrides: tuple[str, ...]


def sweeps(study: Study) -> list[Sweep]:
    """List what the claims need."""
    fixed = (f"sae.expansion={study.width}", f"sae.k={study.k}")
    rivals = (f"sae.expansion={study.width}", f"sae.k={_comma(study.rival_ks)}")
    both = ("topk", "batchtopk")
    special = (*SPECIAL, f"sae.expansion={study.width}", f"sae.k={_comma(study.ks)}")
    return [
        Sweep("grid", both, (f"sae.expansion={_comma(study.widths)}", f"sae.k={_comma(study.ks)}")),
        Sweep("dead", ("topk",), (f"sae.expansion={study.widest}", f"sae.k={study.k}")),
        Sweep("rivals", ("gated", "jumprelu"), rivals),
        Sweep("baseline", ("relu",), rivals),
        Sweep("batch", both, fixed),
        Sweep("special", ("batchtopk",), special),
    ]


def commands(study: Study, cache: str, out: str) -> list[list[str]]:
    """Give the arguments of python for every harvest and sweep, in order."""
    harvest = ["-m", "harvest", *study.model, *study.harvest, f"sites=[{study.site}]", f"cache={cache}"]
    lines = [[*harvest, f"tokens={study.rows}"], [*harvest, f"tokens={study.special_rows}", *SPECIAL]]
    for sweep in sweeps(study):
        groups = by_rate(study, sweep.variants)
        for rate, variants in groups:
            tokens = study.special_tokens if sweep.name == "special" else study.tokens
            batches = study.batches if sweep.name == "batch" else [study.batch]
            line = ["-m", "train", "-m", *study.model, *study.train, f"site={study.site}", f"cache={cache}"]
            line += [f"tokens={tokens}", f"seed={_comma(study.seeds)}", f"batch={_comma(batches)}"]
            line += [f"calibration_tokens={study.calibration_tokens}", f"hydra.sweep.dir={out}/saes/{sweep.name}"]
            line += [f"+claims={sweep.name}", *sweep.overrides]
            if len(groups) > 1:
                line.append(f"sae={_comma(variants)}")
            if rate is not None:
                line.append(f"optimizer.lr={rate:g}")
            lines.append(line)
    return lines


def by_rate(study: Study, variants: Iterable[str]) -> list[tuple[float | None, list[str]]]:
    """Sort variants by their learning rate; those of one rate are trained in one pass."""
    groups: dict[float | None, list[str]] = {}
    for variant in variants:
        groups.setdefault(getattr(study.rates, variant), []).append(variant)
    return list(groups.items())


def run_all(study: Study, cache: str, out: str) -> None:
    """Run every command in turn; UserError after the first that fails."""
    for arguments in commands(study, cache, out):
        shown = " ".join(arguments)
        print(f"python {shown}", flush=True)
        if subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode:
            raise UserError(
                f"python {shown} failed (its message stands above): fix it, then give the same command again"
            )


def _comma(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))
