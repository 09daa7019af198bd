"""python -m pytest tests/train/sae/test_init.py"""

from __future__ import annotations

import pytest
import torch

from data.base.errors import UserError
from tests.helpers.toy import FORMS, D, F, activations, f_of, make
from train.sae import VARIANTS
from train.sae.parts.init import directions, geometric_median
from train.sae.variants.batchtopk import BatchTopKBase


def test_geometric_median_of_points_on_a_line() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(x), x[1], rtol=0, atol=1e-4)


def test_geometric_median_of_a_triangle_sees_its_sides_under_equal_angles() -> None:
    x = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    towards = x - geometric_median(x, tolerance=1e-12)
    towards = towards / towards.norm(dim=1, keepdim=True)
    cosines = [(towards[i] @ towards[j]).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert cosines == pytest.approx([-0.5] * 3, abs=1e-5)  # Fermat's point


def test_geometric_median_ignores_an_outlier_that_drags_the_mean() -> None:
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    x[0] = 1e5
    assert x.mean(0).norm() > 100
    assert geometric_median(x).norm() < 0.3


def test_geometric_median_of_equal_points() -> None:
    x = torch.full((5, 3), 2.0)
    assert torch.equal(geometric_median(x), x[0])


def test_directions_are_unit_and_move_no_global_state() -> None:
    before = torch.get_rng_state()
    rows = directions(100, 7, seed=3)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(100))
    assert torch.equal(rows, directions(100, 7, seed=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("norm", ["none", "dataset", "token"])
@pytest.mark.parametrize("form", FORMS)
def test_an_initialised_sae_is_in_scale(form: str, norm: str) -> None:
    x = activations(2048)
    sae = make(form, input_norm=norm)
    xn = sae.norm.normalise(x)
    torch.testing.assert_close(sae.variance, (xn - xn.mean(0)).square().sum(1).mean())
    torch.testing.assert_close(sae.mean_sq, xn.square().sum(1).mean())
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(xn))
    torch.testing.assert_close(torch.linalg.vector_norm(sae.W_dec, dim=1), torch.ones(F))
    ratio = (sae.W_enc / sae.W_dec.t()).detach()
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.mean())))
    first = xn[:1024]
    made = f_of(sae.loss(first)) @ sae.W_dec
    lengths = made.square().sum() / (first - sae.b_dec).square().sum()
    # A quantile leaves the smallest out by which it is measured. A target's thresholds rise after the scale is set, so
    # it starts smaller, by what the latents beyond 2k would add.
    loose = {"jumprelu": 0.02, "batchtopk quantile": 1e-3, "matryoshka quantile": 1e-3, "jumprelu target": 0.5}
    assert lengths.item() == pytest.approx(1, rel=loose.get(form, 1e-4))


@pytest.mark.parametrize("form", FORMS)
def test_subtracting_b_dec_or_not_starts_as_the_same_function(form: str) -> None:
    x = activations(64, seed=5)
    centred, uncentred = (make(form, apply_b_dec_to_input=flag) for flag in (True, False))
    assert centred.b_dec.abs().max() > 0.5
    assert not torch.equal(centred.get_parameter(centred.bias_names[0]), uncentred.get_parameter(centred.bias_names[0]))
    torch.testing.assert_close(centred(x), uncentred(x), rtol=1e-3, atol=1e-3)


def test_the_stores_moments_are_used_where_given() -> None:
    x = activations(2048)
    sae = VARIANTS["batchtopk"](D, F, k=4)
    sae.initialise(x[:512], mean_sq_norm=400.0, variance=50.0)
    assert sae.norm.scale.item() == pytest.approx((D / 400) ** 0.5)
    assert sae.variance.item() == pytest.approx(50 * D / 400)
    assert sae.mean_sq.item() == pytest.approx(D)
    sae = VARIANTS["batchtopk"](D, F, k=4, input_norm="none")
    sae.initialise(x[:512], mean_sq_norm=400.0, variance=50.0)
    assert (sae.norm.scale.item(), sae.variance.item(), sae.mean_sq.item()) == (1, 50, 400)


def test_jumprelu_starts_from_thresholds_in_the_units_of_x() -> None:
    for norm, mean_sq in (("dataset", float(D)), ("none", 900.0)):
        sae = VARIANTS["jumprelu"](D, F, sparsity=0.1, input_norm=norm)
        sae.initialise(activations(512), mean_sq_norm=900.0, variance=100.0)
        theta = sae.get_parameter("theta").detach()
        torch.testing.assert_close(theta, torch.full((F,), 0.001 * mean_sq**0.5))


@pytest.mark.parametrize("centred", [True, False])
def test_an_untied_encoder_starts_as_a_permutation_of_the_tied_one(centred: bool) -> None:
    tied, untied = (make("topk", tied_init=flag, apply_b_dec_to_input=centred) for flag in (True, False))
    own = torch.nn.functional.cosine_similarity(untied.W_enc_FD, untied.W_dec)
    assert torch.equal(tied.W_dec, untied.W_dec) and own.abs().max() < 0.95
    order = torch.nn.functional.normalize(untied.W_enc_FD, dim=1) @ tied.W_dec.t()
    torch.testing.assert_close(order.amax(1), torch.ones(F))
    assert len(order.argmax(1).unique()) == F
    x = activations(64, seed=5)
    z, z_tied = (sae.pre_activation(sae.norm.normalise(x)) for sae in (untied, tied))
    torch.testing.assert_close(z / z.norm(), (z_tied / z_tied.norm())[:, order.argmax(1)])


def test_batchtopk_starts_with_the_threshold_of_its_sample() -> None:
    sae, x = make("batchtopk"), activations(2048)
    assert isinstance(sae, BatchTopKBase)
    z = sae.pre_activation(sae.norm.normalise(x[:1024])).detach().flatten()
    assert sae.threshold == z.topk(1024 * 4).values[-1]
    assert sae.threshold_weight == 0


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (torch.zeros(8, D), "all zero"),
        (torch.full((8, D), 3.0), "do not vary"),
        (torch.ones(1, D), "at least 2"),
        (torch.tensor([[float("nan")] * D, [1.0] * D]), "finite"),
    ],
)
def test_data_an_sae_cannot_start_from_is_refused(sample: torch.Tensor, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        VARIANTS["batchtopk"](D, F, k=4).initialise(sample)
