"""The learning rate of a run that names none (`optimizer.lr=auto`): one rule, measured on four sites.

lr = c (64 / D)^(1/2) (1000 / steps)^(1/3) (batch / 1024)^(1/4) (8 D / F)^p, c and p of the variant. Adam moves each of
a latent's D weights by about lr a step, so its direction by lr sqrt(D). JumpReLU's falls as 64 / D up to D = 192: at
higher rates its thresholds leave the wanted L0. c and the powers are fitted to the sites they are compared on, one seed
each; those of batch and F on one site (D = 64), with batches of 256 to 4,096 and 2 to 32 times D latents. The steps
were 215 to 3,648. At the papers' sizes it gives 4e-4 for BatchTopK (D = 768; theirs is 3e-4), 4.5e-4 for Gated
(2560; 3e-4) and 1.1e-4 for JumpReLU (3584; 7e-5). `python -m benchmarks.rates` searches a site.
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


BATCH, LEAST_BATCH, MOST_BATCH = 1024, 256, 4096  # tokens; where c was measured, and how far the power was
EXPANSION, LEAST_EXPANSION = 8, 2  # latents for each of D; wider ones go on falling, as Gao et al. (2406.04093) have it

BY_EXPANSION = {  # p
    "relu": 1 / 4,
    "topk": 1 / 2,
    "batchtopk": 3 / 8,
    "matryoshka": 0.0,
    "gated": 1 / 4,
    "jumprelu": 1 / 4,
}


def learning_rate(variant: str, d_in: int, steps: int, *, batch: int = BATCH, expansion: float = EXPANSION) -> float:
    """Compute the rule's rate, to three figures; `batch` in tokens over all ranks, `expansion` F / D.

    Outside of what was measured it is that of the nearest: D = 64, 400 steps (more would cost latents), 256 and 4,096
    tokens, 2 times D latents.
    """
    width = max(LEAST_WIDTH, d_in)
    steep = min(width, STEEP_TO.get(variant, LEAST_WIDTH))
    by_width = LEAST_WIDTH / steep * math.sqrt(steep / width)
    by_steps = (1000 / max(LEAST_STEPS, steps)) ** (1 / 3)
    by_batch = (min(max(LEAST_BATCH, batch), MOST_BATCH) / BATCH) ** (1 / 4)
    by_expansion = (EXPANSION / max(LEAST_EXPANSION, expansion)) ** BY_EXPANSION[variant]
    return float(f"{AT_64[variant] * by_width * by_steps * by_batch * by_expansion:.3g}")


def with_rate(settings: TrainSettings, d_in: int, steps: int, *, batch: int, expansion: float) -> TrainSettings:
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
    rate = learning_rate(variant, d_in, steps, batch=batch, expansion=expansion)
    return settings.model_copy(update={"optimizer": optimizer.model_copy(update={"lr": rate}), "lr_asked": asked})
