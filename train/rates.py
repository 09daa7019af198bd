"""The learning rate of a run that names none (`optimizer.lr=auto`): one rule, measured on four sites.

lr = c (64 / D)^(1/2) (1000 / steps)^(1/3), c of the variant. Adam moves each of a latent's D weights by about lr a
step, so its direction by lr sqrt(D). JumpReLU's falls as 64 / D up to D = 192: at higher rates its thresholds leave the
wanted L0. c and the powers are fitted to the sites they are compared on, one seed each. The steps were 228 to 976, for
BatchTopK up to 3,648; at the papers' lengths it gives 5e-4 for BatchTopK (D = 768; theirs is 3e-4), 5e-4 for Gated
(2560; 3e-4) and 1.2e-4 for JumpReLU (3584; 7e-5). The batch does not enter: it was 1,024 tokens wherever this was
measured. `python -m benchmarks.rates` searches a site.
"""

from __future__ import annotations

import math

from data.base.errors import UserError
from train.config import AUTO, TrainSettings

ADAM = ("adam", "adamw", "adam8bit")  # the rule is of optimizers whose step is about lr a weight

LEAST_WIDTH, LEAST_STEPS = 64, 400

AT_64 = {  # c: the rate at D = 64 in 1,000 steps
    "relu": 2.2e-2,
    "topk": 1.4e-2,
    "batchtopk": 1.0e-2,
    "matryoshka": 7e-3,
    "gated": 2.0e-2,
    "jumprelu": 1.2e-2,
}

STEEP_TO = {"jumprelu": 192}  # the width up to which a variant's rate falls as 1 / D


def learning_rate(variant: str, d_in: int, steps: int) -> float:
    """Compute the rule's rate, to three figures.

    Below D = 64, where nothing was measured, it is that of 64; below 400 steps, where more would cost latents, of 400.
    """
    width = max(LEAST_WIDTH, d_in)
    steep = min(width, STEEP_TO.get(variant, LEAST_WIDTH))
    by_width = LEAST_WIDTH / steep * math.sqrt(steep / width)
    by_steps = (1000 / max(LEAST_STEPS, steps)) ** (1 / 3)
    return float(f"{AT_64[variant] * by_width * by_steps:.3g}")


def with_rate(settings: TrainSettings, d_in: int, steps: int) -> TrainSettings:
    """Settle a run on its rate as a number; `lr_asked` keeps what was asked for.

    Raises UserError where the rule knows no rate: for another optimizer than Adam.
    """
    optimizer = settings.optimizer
    asked = optimizer.lr if settings.lr_asked is None else settings.lr_asked
    if optimizer.lr != AUTO:
        return settings.model_copy(update={"lr_asked": asked})
    if optimizer.name not in ADAM:
        raise UserError(
            f"optimizer.lr=auto is measured for Adam, and optimizer.name={optimizer.name}: give optimizer.lr a number"
        )
    variant = settings.sae.get("variant")
    if not isinstance(variant, str) or variant not in AT_64:
        raise UserError(f"sae.variant={variant} is not a variant of this project: choose sae={'|'.join(AT_64)}")
    rate = learning_rate(variant, d_in, steps)
    return settings.model_copy(update={"optimizer": optimizer.model_copy(update={"lr": rate}), "lr_asked": asked})
