"""Each form against its formula written out, and the rescaling against planted scales."""

from __future__ import annotations

import pytest
import torch

from benchmarks.claims.forms import rescaled, turned, with_threshold
from evaluate.forms import BatchForm
from train.sae.base import SAE
from train.sae.variants.batchtopk import BatchTopK
from train.sae.variants.relu import ReLU
from train.sae.variants.topk import TopK

D, F, K = 12, 48, 3


def started(sae: SAE) -> SAE:
    x = torch.randn(512, D, generator=torch.Generator().manual_seed(0)) * 3 + 1
    sae.initialise(x, seed=1)
    return sae.eval()


def rows(seed: int, count: int = 256) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@torch.no_grad()
def test_the_batch_form_keeps_the_largest_of_all_it_reads() -> None:
    sae = started(BatchTopK(D, F, k=K))
    x = rows(1)
    z = sae.pre_activation(sae.norm.normalise(x))
    least = z.flatten().topk(K * len(x)).values.min()
    f, x_hat = BatchForm(turned(sae, BatchTopK)).run(x)
    assert torch.equal(f, torch.where(z >= least, z, 0.0).relu())
    torch.testing.assert_close(x_hat, sae.norm.denormalise(f @ sae.W_dec + sae.b_dec, x))


@torch.no_grad()
def test_topk_weights_under_a_threshold_and_back() -> None:
    sae = started(TopK(D, F, k=K))
    x = rows(2, 1024)
    other = with_threshold(sae, [x[:512], x[512:]])
    z = sae.pre_activation(sae.norm.normalise(x))
    f, _ = other.encode_decode(x)
    torch.testing.assert_close(f, torch.where(z > other.threshold, z, 0.0))
    assert float((f > 0).sum(1).float().mean()) == pytest.approx(K, rel=0.05)
    assert int((f > 0).sum(1).max()) > K
    again, _ = turned(other, TopK).encode_decode(x)
    torch.testing.assert_close(again, sae.encode_decode(x)[0])


@torch.no_grad()
def test_scales_and_shifts_are_those_of_least_squares() -> None:
    """Against the design matrix written out in float64: a column for each latent's scale and one for its shift."""
    sae = started(ReLU(D, 5, sparsity=0.1, form="bricken", apply_b_dec_to_input=True))
    x = rows(4, 400)
    found = rescaled(sae, [x[:150], x[150:]])
    g, xn = sae.encode_decode(x)[0].double(), sae.norm.normalise(x).double()
    columns = [(part[:, j, None] * sae.W_dec[j]).flatten() for part in (g, (g > 0).double()) for j in range(5)]
    solved = torch.linalg.lstsq(torch.stack(columns, 1), (xn - sae.b_dec).flatten()).solution
    torch.testing.assert_close(found.scale_F.double(), solved[:5], rtol=0.01, atol=0.01)
    torch.testing.assert_close(found.shift_F.double(), solved[5:], rtol=0.01, atol=0.01)
    wanted = (g * solved[:5] + solved[5:]).relu() * (g > 0)
    torch.testing.assert_close(found.encode_decode(x)[0].double(), wanted, rtol=0.03, atol=0.03)


@torch.no_grad()
def test_a_latent_that_never_fires_keeps_its_scale() -> None:
    sae = started(ReLU(D, F, sparsity=0.1, form="bricken", apply_b_dec_to_input=True))
    sae.get_parameter("b_enc")[7] = -1e6
    found = rescaled(sae, [rows(5)])
    assert float(found.scale_F[7]) == pytest.approx(1) and float(found.shift_F[7]) == pytest.approx(0, abs=1e-6)
