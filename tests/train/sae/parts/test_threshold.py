"""python -m pytest tests/train/sae/test_calibrate.py: the running mean, T and T_k against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from tests.helpers.toy import K, activations, make, train, train_step
from train.sae.parts.threshold import calibrate, running_mean_
from train.sae.variants.batchtopk import BatchTopKBase


def test_running_mean_by_hand() -> None:
    mean, weight = torch.tensor(7.0), torch.tensor(0.0)  # where it starts has no weight
    for value, wanted in ((2.0, 2.0), (4.0, (0.5 * 2 + 4) / 1.5), (8.0, (0.25 * 2 + 0.5 * 4 + 8) / 1.75)):
        running_mean_(mean, weight, torch.tensor(value), 0.5)
        assert mean.item() == pytest.approx(wanted)
    assert weight.item() == pytest.approx(1 - 0.5**3)


def test_running_mean_skips_a_batch_without_a_threshold() -> None:
    mean, weight = torch.tensor(3.0), torch.tensor(0.5)
    running_mean_(mean, weight, torch.tensor(0.0), 0.5)
    assert (mean.item(), weight.item()) == (3.0, 0.5)


@pytest.mark.parametrize("form", ["batchtopk", "matryoshka"])
def test_training_follows_the_bias_corrected_mean_from_the_first_step(form: str) -> None:
    sae = make(form)
    kept = [float(step.min_kept) for step in train(sae, 30) if step.min_kept is not None]
    decays = 0.999 ** np.arange(29, -1, -1)
    assert isinstance(sae, BatchTopKBase)
    assert sae.threshold.item() == pytest.approx((decays * kept).sum() / decays.sum(), rel=1e-5)
    assert sae.skipped_batches == 0


def test_training_counts_the_batches_it_skips() -> None:
    sae = make("batchtopk")
    assert isinstance(sae, BatchTopKBase)
    train(sae, 2)
    before = sae.threshold.clone()
    with torch.no_grad():
        sae.get_parameter("b_enc").sub_(100.0)
    train(sae, 3)
    assert sae.skipped_batches == 3
    assert torch.equal(sae.threshold, before)


def pre_activations(batches: int, rows: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 20, generator=generator) * (1 + i / batches) for i in range(batches)]


def test_calibration_is_its_definition() -> None:
    z, k = pre_activations(7, 9), 3
    found = calibrate(lambda batch: batch, z, k)
    smallest = [np.sort(batch.numpy().ravel())[-k * 9] for batch in z]
    values = np.sort(np.concatenate([batch.numpy().ravel() for batch in z]))
    assert found.threshold == pytest.approx(np.mean(smallest), rel=1e-6)
    assert found.threshold_k == values[-k * 63]
    assert found.l0 == pytest.approx((values > found.threshold).sum() / 63)
    assert (found.batches, found.skipped, found.tokens) == (7, 0, 63)


def test_calibration_on_one_batch_is_its_smallest_kept_value() -> None:
    (z,) = pre_activations(1, 9)
    found = calibrate(lambda batch: batch, [z], 3)
    assert found.threshold == found.threshold_k == z.flatten().topk(27).values[-1]
    assert found.l0 == pytest.approx(26 / 9)  # z > T leaves the smallest out


def test_calibration_of_batches_of_unequal_size() -> None:
    z = [*pre_activations(3, 8), *pre_activations(1, 5, seed=1)]
    found = calibrate(lambda batch: batch, z, 2)
    values = np.sort(np.concatenate([batch.numpy().ravel() for batch in z]))
    assert found.threshold_k == values[-2 * 29]


def test_calibration_skips_and_counts_batches_without_enough_positives() -> None:
    z, k = pre_activations(4, 9), 3
    z[1] = -z[1].abs()
    found = calibrate(lambda batch: batch, z, k)
    smallest = [np.sort(batch.numpy().ravel())[-k * 9] for i, batch in enumerate(z) if i != 1]
    values = np.sort(np.concatenate([batch.numpy().ravel() for batch in z]))
    assert found.threshold == pytest.approx(np.mean(smallest), rel=1e-6)
    assert found.threshold_k == values[-k * 36]  # enough positives in the whole set
    assert (found.batches, found.skipped, found.tokens) == (3, 1, 36)


def test_calibration_without_enough_positives_at_all() -> None:
    found = calibrate(lambda batch: batch, [-batch.abs() for batch in pre_activations(2, 4)], 3)
    assert (found.threshold, found.threshold_k, found.l0, found.skipped) == (0, 0, 0, 2)


def test_a_calibrated_sae_has_the_l0_it_was_asked_for() -> None:
    sae, held = make("batchtopk"), activations(4000, seed=8)
    train(sae, 100)
    assert isinstance(sae, BatchTopKBase)
    weights = {name: p.clone() for name, p in sae.named_parameters()}
    found = sae.calibrate(list(activations(4096, seed=7).split(128)))
    assert sae.threshold.item() == pytest.approx(found.threshold)
    assert found.l0 == pytest.approx(K, rel=0.05)
    assert (sae.encode(held) > 0).sum().item() / 4000 == pytest.approx(K, rel=0.1)
    assert all(torch.equal(weights[name], p) for name, p in sae.named_parameters())


def test_calibration_takes_the_stores_units_and_dtype() -> None:
    sae = make("batchtopk")
    assert isinstance(sae, BatchTopKBase)
    batches = [batch.bfloat16() for batch in activations(512, seed=7).split(128)]
    found = sae.calibrate(batches)
    steps = [sae.loss(sae.norm.normalise(batch)) for batch in batches]
    smallest = [step.min_kept.item() for step in steps if step.min_kept is not None]
    assert found.threshold == pytest.approx(np.mean(smallest))


def test_calibration_on_nothing_is_refused() -> None:
    sae = make("batchtopk")
    assert isinstance(sae, BatchTopKBase)
    with pytest.raises(UserError, match="calibration_tokens"):
        sae.calibrate([])


@pytest.mark.parametrize("form", ["batchtopk", "matryoshka"])
def test_the_last_steps_guess_changes_no_weight(form: str) -> None:
    """Also a guess that is far too high, and one that is gone, as after a resume."""
    followed, disturbed = make(form), make(form)
    train(followed, 12)
    optimizer = torch.optim.Adam(disturbed.parameters(), lr=3e-3)
    for i in range(12):
        assert isinstance(disturbed, BatchTopKBase)
        disturbed.guess = (None, torch.tensor(1e9), torch.tensor(1e-9))[i % 3]
        train_step(disturbed, optimizer, activations(128, seed=1000 + i))
    assert isinstance(followed, BatchTopKBase) and followed.guess is not None and followed.guess > 0
    for one, other in zip(followed.state_dict().values(), disturbed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
