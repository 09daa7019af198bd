"""Dead latents of the variants without AuxK: their biases rise until they fire."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.base.errors import UserError
from tests.helpers.toy import F, activations, make
from train.optimizers import OPTIMIZERS
from train.sae import SAE
from train.sae_trainer import SAETrainer
from train.schedules import Schedule

FORMS = ["relu", "relu bricken", "gated", "jumprelu target"]
WINDOW = 256  # tokens


def trainer_of(sae: SAE, steps: int) -> SAETrainer:
    return SAETrainer(
        sae,
        lambda groups: OPTIMIZERS["adam"](groups, lr=1e-3, betas=(0.8, 0.97)),
        Schedule.of_shares(steps, 0.0, 0.0, 0.0),
        folder=Path("nowhere"),
        name="case",
        seed=0,
        dead_after=WINDOW,
    )


def trained_from_death(form: str, revive: float, steps: int = 120) -> SAETrainer:
    """Train an SAE of which every fourth latent begins far below its threshold."""
    sae = make(form, revive=revive)
    with torch.no_grad():
        for name in sae.bias_names:
            sae.get_parameter(name)[::4] -= 6
    trainer = trainer_of(sae, steps)
    for step in range(steps):
        trainer.training_step(activations(128, seed=step))
    return trainer


@pytest.mark.parametrize("form", FORMS)
def test_silent_latents_fire_again_and_stay_silent_without_it(form: str) -> None:
    assert trained_from_death(form, 0.0).dead.mask(WINDOW)[::4].all()
    revived = trained_from_death(form, 0.2)
    assert int(revived.dead.mask(WINDOW)[::4].sum()) <= F // 4 // 4
    # What has come back is part of the inference form, too.
    assert ((revived.sae.encode(activations(4096)) > 0).any(0)[::4]).float().mean() > 0.7


@pytest.mark.parametrize("form", FORMS)
def test_by_how_much_the_biases_rise(form: str) -> None:
    """By `revive` where E||x'||^2 = D, and in proportion to the entries where it is not; of the dead alone."""
    after = []
    for revive in (0.0, 0.05):
        trainer = trainer_of(make(form, revive=revive), 1)
        trainer.sae.mean_sq.fill_(4.0 * trainer.sae.d_out)
        trainer.dead.since_F[::3] = WINDOW
        trainer.training_step(activations(128, seed=0))
        after.append({name: bias.detach() for name, bias in trainer.sae.named_parameters()})
    rise_F = 0.1 * (torch.arange(F) % 3 == 0)
    for name, before in after[0].items():
        risen = rise_F if name in make(form).bias_names else torch.zeros(())
        torch.testing.assert_close(after[1][name] - before, risen.expand_as(before), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["topk", "batchtopk", "matryoshka"])
def test_auxk_s_variants_have_no_such_setting(form: str) -> None:
    with pytest.raises(UserError, match="revive"):
        make(form, revive=0.05)


def test_a_step_in_which_nobody_is_dead_is_the_same_with_and_without() -> None:
    weights = []
    for revive in (0.0, 0.05):
        trainer = trainer_of(make("gated", revive=revive), 1)
        trainer.training_step(activations(128, seed=0))
        weights.append(trainer.sae.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
