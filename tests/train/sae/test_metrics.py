"""The sums that validation and evaluation share, against values worked by hand and against plain float64."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.toy import D, F, activations, make
from train.sae import Batch
from train.sae.metrics import FiringSums, ReconstructionSums, held_out
from train.sae.sparse.backend import use_backend
from train.sae.sparse.cpu import CPUBackend


def test_errors_and_deviations_by_hand() -> None:
    sums = ReconstructionSums(torch.tensor([1.0, 0.0]), groups=2)
    x, x_hat = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]]), torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 3.0]])
    assert sums.add(x, x_hat, torch.tensor([0, 0, 1])).tolist() == [1, 0, 4]
    table = sums.table()
    # About the centre (1, 0) the mean is (1, 1): its square, 2, goes off for each token of 0 + 4, and of 10.
    assert (table["tokens"].tolist(), table["error"].tolist()) == ([2, 1], [1, 4])
    assert table["deviation"].tolist() == [0, 8]
    assert sums.nmse() == pytest.approx(5 / 8)


def test_the_centre_and_the_groups_change_no_result() -> None:
    x, x_hat = activations(300), activations(300, seed=1)
    reference = (x.double() - x_hat.double()).square().sum() / (x.double() - x.double().mean(0)).square().sum()
    for centre_D in (torch.zeros(D), x.mean(0), torch.full((D,), 1e3)):
        sums = ReconstructionSums(centre_D, groups=3)
        for part, part_hat in zip(x.split(70), x_hat.split(70), strict=True):
            sums.add(part, part_hat, torch.arange(len(part)) % 3)
        assert sums.nmse() == pytest.approx(float(reference), rel=1e-9)


def test_firings_by_hand() -> None:
    sums = FiringSums(3, groups=2)
    assert sums.add(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]), torch.tensor([1, 0])).tolist() == [2, 1]
    sums.add(torch.zeros(2, 3), torch.tensor([1, 1]))
    assert (sums.l0.tolist(), sums.tokens.tolist(), sums.fired_F.tolist()) == ([1, 2], [1, 3], [1, 0, 2])
    assert (sums.mean_l0(), sums.silent()) == (0.75, 1)


def test_validation_scores_the_inference_form() -> None:
    sae, x = make("topk"), activations(200, seed=5)
    sae.matmul = "bf16"
    (found,) = held_out([sae], map(Batch, x.split(64)), torch.device("cpu"))
    f, x_hat = sae.eval().encode_decode(x)
    assert found["nmse"] == pytest.approx(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-5)
    assert (found["l0"], found["tokens"]) == (float((f > 0).sum(1).double().mean()), 200)
    assert found["silent"] == F - int((f > 0).any(0).sum())
    sae.train()
    held_out([sae], map(Batch, x.split(64)), torch.device("cpu"))
    assert sae.training


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["all of z", "sparse"])
@pytest.mark.parametrize("form", ["relu", "topk", "batchtopk"])
def test_firings_of_codes_are_those_of_the_matrix(form: str, share: float) -> None:
    sae, by_matrix, by_codes = make(form), FiringSums(F), FiringSums(F)
    with use_backend(CPUBackend(dense_share=share)):
        for seed in (1, 2):
            f_BF, x_hat_BE = sae.encode_decode(activations(50, seed))
            codes, f, x_hat = sae.encode_decode_sparse(activations(50, seed))
            assert torch.equal(x_hat, x_hat_BE)
            assert torch.equal(codes.dense(f), f_BF)
            by_matrix.add(f_BF)
            by_codes.add_codes(codes, f)
    for name in ("tokens", "l0", "fired_F"):
        assert torch.equal(getattr(by_codes, name), getattr(by_matrix, name))
    assert int(by_codes.l0) > 0
