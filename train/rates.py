"""The learning rate of a run that names none (`optimizer.lr=auto`): one rule, measured on four sites.

lr = c (64 / D)^(1/2) (1000 / steps)^(1/3), c of the variant. Adam moves each of a latent's D weights by about lr a
step, so its direction by lr sqrt(D). The power of the steps was measured from 228 to 976 of them and is a choice
beyond: at the papers' lengths it gives 5e-4 for BatchTopK (D = 768; theirs is 3e-4), 4e-4 for Gated (2560; 3e-4) and
1.2e-4 for JumpReLU (3584; 7e-5). The batch does not enter: it was 1,024 tokens wherever this was measured. The evidence
and its commands are in benchmarks/RESULTS.md; `python -m benchmarks.rates` searches a site.
"""

from __future__ import annotations

import math
from typing import Any

from data.base.errors import UserError

AUTO = "auto"
ADAM = ("Adam", "AdamW")  # the rule is of optimizers whose step is about lr a weight

LEAST_WIDTH, LEAST_STEPS = 64, 400

AT_64 = {  # c: the rate at D = 64 in 1,000 steps
    "relu": 2.2e-2,
    "topk": 1.4e-2,
    "batchtopk": 1.1e-2,
    "matryoshka": 7e-3,
    "gated": 1.7e-2,
    "jumprelu": 7e-3,
}


def learning_rate(variant: str, d_in: int, steps: int) -> float:
    """Compute the rule's rate, to three figures.

    Below D = 64, where nothing was measured, it is that of 64; below 400 steps, where more would cost latents, of 400.
    """
    by_width = math.sqrt(64 / max(LEAST_WIDTH, d_in))
    by_steps = (1000 / max(LEAST_STEPS, steps)) ** (1 / 3)
    return float(f"{AT_64[variant] * by_width * by_steps:.3g}")


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
