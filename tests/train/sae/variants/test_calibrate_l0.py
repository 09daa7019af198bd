"""python -m pytest tests/train/sae/variants/test_calibrate_l0.py: the L0 that was asked for, after training."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.toy import activations, make
from train.sae import SAE
from train.sae.parts.threshold import find_level, in_parts

AIMED = ("relu at k", "gated at k", "jumprelu target")
BATCHES = [activations(256, seed=seed) for seed in range(4)]


def active(sae: SAE) -> int:
    return sum(int((sae.encode(x_BD) > 0).sum()) for x_BD in BATCHES)


def test_a_level_worked_by_hand() -> None:
    """Of 5, 4, -1, 3, 2, -inf in two batches of a row each, two a row are above the mean of 2 and -1."""
    batches = [torch.tensor([[5.0, 4.0, -1.0]]), torch.tensor([[3.0, 2.0, -torch.inf]])]
    found = find_level(lambda x_BD: x_BD, batches, 2, at=2.5)
    assert (found.before, found.l0, found.level, found.tokens) == (1.5, 2.0, 0.5, 2)


def test_batches_in_parts_have_the_same_level() -> None:
    """Parts of 1, 3 and 100 of the batch's 100 rows, of margins in which many are equal and a row cannot fire."""
    batches = [(10 * torch.randn(100, 40, generator=torch.Generator().manual_seed(seed))).round() for seed in range(3)]
    batches[1][5] = -torch.inf
    whole = find_level(lambda x_BD: x_BD, batches, 3.3, at=0.0)
    for entries, parts in ((1, 300), (40, 300), (130, 102), (1 << 28, 3)):
        cut = in_parts(batches, 40, entries)
        assert len(cut) == parts and torch.equal(torch.cat(cut), torch.cat(batches))
        assert find_level(lambda x_BD: x_BD, cut, 3.3, at=0.0) == whole


@pytest.mark.parametrize("form", AIMED)
@pytest.mark.parametrize("target", [2.0, 5.25, 20.0])
def test_the_mean_l0_becomes_the_target(form: str, target: float) -> None:
    sae = make(form, target_l0=target)
    before = active(sae) / 1024
    found = sae.calibrate_l0(BATCHES)
    assert found is not None and found.tokens == 1024
    assert found.before == pytest.approx(before, abs=2e-3)  # the sparse product rounds in another order
    assert active(sae) / 1024 == pytest.approx(target, abs=2e-3)
    assert found.l0 == pytest.approx(target, abs=2e-3)


@pytest.mark.parametrize("form", AIMED)
def test_it_is_settled_after_once(form: str) -> None:
    sae = make(form, target_l0=6.0)
    sae.calibrate_l0(BATCHES)
    settled = {name: value.clone() for name, value in sae.state_dict().items()}
    again = sae.calibrate_l0(BATCHES)
    assert again is not None and again.before == pytest.approx(6.0, abs=2e-3)
    for name, value in sae.state_dict().items():
        torch.testing.assert_close(value, settled[name], rtol=1e-3, atol=1e-4)


def test_gated_changes_no_magnitude() -> None:
    """A latent that fires before and after has the f it had."""
    sae = make("gated at k", target_l0=3.0)
    before = sae.encode(BATCHES[0])
    sae.calibrate_l0(BATCHES)
    after = sae.encode(BATCHES[0])
    both = (before > 0) & (after > 0)
    assert both.any()
    torch.testing.assert_close(after[both], before[both])


@pytest.mark.parametrize("form", ["relu", "gated", "jumprelu", "topk"])
def test_without_a_target_nothing_moves(form: str) -> None:
    sae = make(form)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    assert sae.calibrate_l0(BATCHES) is None
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())
