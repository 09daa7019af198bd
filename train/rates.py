"""The learning rate of a run that names none (`optimizer.lr=auto`): one rule, measured on four sites.

lr = c sqrt(64 / D) min(1, sqrt(1000 / steps)), c of the variant. Adam moves each of a latent's D weights by about lr a
step, so its direction by lr sqrt(D). From 250 to 1,000 steps the best rate does not depend on their number; in longer
runs it falls, and the square root is a choice that meets the papers' 3e-4 at 244,000 steps of D = 768 (here 2.0e-4 for
BatchTopK). The evidence and its commands are in benchmarks/RESULTS.md; `python -m benchmarks.rates` searches a site.
"""

from __future__ import annotations

import math
from typing import Any

from data.base.errors import UserError

AUTO = "auto"
ADAM = ("Adam", "AdamW")  # the rule is of optimizers whose step is about lr a weight

FLAT_STEPS = 1000  # up to which the best rate does not depend on their number
AT_64 = {  # c: the rate at D = 64
    "relu": 2.2e-2,
    "topk": 1.4e-2,
    "batchtopk": 1.1e-2,
    "matryoshka": 7e-3,
    "gated": 1.7e-2,
    "jumprelu": 9e-3,
}


def learning_rate(variant: str, d_in: int, steps: int) -> float:
    """Compute the rule's rate, to three figures; below D = 64, where nothing was measured, that of 64."""
    falling = min(1.0, math.sqrt(FLAT_STEPS / steps))
    return float(f"{AT_64[variant] * math.sqrt(64 / max(64, d_in)) * falling:.3g}")


def with_rate(settings: dict[str, Any], d_in: int, steps: int) -> dict[str, Any]:
    """The settings of a run with its rate as a number, and under `lr_asked` what was asked for."""
    optimizer = settings["optimizer"]
    asked = optimizer["lr"]
    if not isinstance(asked, str):
        return {"lr_asked": asked, **settings}
    if asked != AUTO:
        raise UserError(f"optimizer.lr={asked} is no learning rate: give a number, or auto for the measured rule")
    if str(optimizer["_target_"]).rsplit(".", 1)[-1] not in ADAM:
        raise UserError(
            f"optimizer.lr=auto is measured for Adam, and optimizer._target_={optimizer['_target_']}: give a number"
        )
    variant = str(settings["sae"]["_target_"]).rsplit(".", 2)[-2]
    if variant not in AT_64:
        raise UserError(
            f"optimizer.lr=auto knows no rate for sae._target_={settings['sae']['_target_']}: give a number"
        )
    return {**settings, "optimizer": {**optimizer, "lr": learning_rate(variant, d_in, steps)}, "lr_asked": asked}
