"""The best learning rate of a site beside the rule's (train/rates.py), from one pass over its store.

    python -m benchmarks.rates [out=outputs/rates] [sae=topk,batchtopk] [factors=0.35,0.6,1,1.7,2.9] [OVERRIDE ...]
    python -m benchmarks.rates sae=topk sae.k=32 site=mlp_in.3 target=mlp_out.3 sae.skip=true    # of transcoders

Trains each variant at the rule's rate times each factor, all side by side; the other overrides are those of `python -m
train` (site, target, tokens, store, sae.k ...). `sae.k` has to be given, so that all are compared at one L0: an SAE
whose L0 comes out a few per cent off is read at the target along NMSE ~ L0^-0.6, the slope measured between L0 8 and
24.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir

from data.base import cli
from data.base.composing import guard
from data.base.errors import UserError
from train.rates import AT_64
from train.run import TrainRequest, prepare, train_all
from train.sae import load_config

FACTORS = (0.35, 0.6, 1.0, 1.7, 2.9)
SLOPE = 0.6  # -d log NMSE / d log L0


@dataclass(frozen=True)
class Trial:
    """An SAE trained at `rate`, which is the rule's times `factor`; `nmse` and `l0` on held-out tokens."""

    variant: str
    factor: float
    rate: float
    nmse: float
    l0: float
    dead: int
    k: float

    @property
    def at_target(self) -> float:
        """Return the NMSE read at an L0 of k."""
        return float(self.nmse * (self.l0 / self.k) ** SLOPE)


def table(trials: Sequence[Trial]) -> str:
    """Return one line a variant: the best rate, the rule's, and by how much the rule's NMSE is above the best."""
    lines = [
        "| variant | best rate | NMSE at k | L0 | dead | rule's rate | NMSE at k | L0 | dead | rule above best |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in dict.fromkeys(trial.variant for trial in trials):
        own = [trial for trial in trials if trial.variant == variant]
        best = min(own, key=lambda trial: trial.at_target)
        ours = min(own, key=lambda trial: abs(trial.factor - 1))
        above = ours.at_target / best.at_target - 1
        lines.append(f"| {variant} | {_cells(best)} | {_cells(ours)} | {above:.1%} |")
    return "\n".join(lines)


def _cells(trial: Trial) -> str:
    return f"{trial.rate:.2g} | {trial.at_target:.4f} | {trial.l0:.1f} | {trial.dead}"


def _request(folder: Path, overrides: Sequence[str]) -> TrainRequest:
    asked = [*overrides, f"out={folder}", "validate_every=1000000"]
    guard()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        return TrainRequest(cli.stage_settings(compose("train", asked), "train"), asked)


def search(out: Path, variants: Sequence[str], factors: Sequence[float], overrides: Sequence[str]) -> list[Trial]:
    """Train every variant at every factor in one pass; what is trained already is only read."""
    requests: dict[tuple[str, float], tuple[TrainRequest, float, float]] = {}
    for variant in variants:
        auto = prepare(_request(out / f"{variant}-auto", [*overrides, f"sae={variant}"]))
        assert auto is not None
        if auto.sae.config.wanted_l0 is None:
            raise UserError(f"sae={variant} has no L0 to compare at: give sae.k=<mean latents a token>")
        rule, wanted = auto.settings.optimizer.lr, auto.sae.config.wanted_l0
        assert isinstance(rule, float)  # settled by `prepare`
        for factor in factors:
            rate = float(f"{rule * factor:.3g}")
            asked = [*overrides, f"sae={variant}", f"optimizer.lr={rate}"]
            requests[variant, factor] = (_request(out / f"{variant}-{rate}", asked), rate, wanted)
    train_all([request for request, *_ in requests.values()])
    trials = []
    for (variant, factor), (request, rate, k) in requests.items():
        training = load_config(request.folder)["training"]
        held_out = training["heldout"]
        trials.append(Trial(variant, factor, rate, held_out["nmse"], held_out["l0"], training["dead"], k))
    return trials


def main(arguments: Sequence[str]) -> None:
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return
    own = {"out": "outputs/rates", "sae": ",".join(AT_64), "factors": ",".join(map(str, FACTORS))}
    overrides = []
    for item in arguments:
        name, _, value = item.partition("=")
        if name in own:
            own[name] = value
        else:
            overrides.append(item)
    factors = [float(factor) for factor in own["factors"].split(",")]
    if 1.0 not in factors:
        raise UserError(f"factors={own['factors']} leaves out the rule's own rate: put 1 among them")
    trials = search(Path(own["out"]), own["sae"].split(","), factors, overrides)
    lines = ["variant,factor,rate,nmse,l0,dead,k"]
    for trial in trials:
        fields = (trial.variant, trial.factor, trial.rate, trial.nmse, trial.l0, trial.dead, trial.k)
        lines.append(",".join(map(str, fields)))
    (Path(own["out"]) / "rates.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(table(trials))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
