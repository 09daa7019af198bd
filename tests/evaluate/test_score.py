"""The splice and the scores of a site, against hand-made forwards and SAEs whose effect is known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluate import score as scoring
from evaluate.score import SiteScore
from evaluate.splice import Splice
from harvest.hooks import Site
from train.sae.base import SAE
from train.sae.variants.batchtopk import BatchTopK
from train.sae.variants.relu import ReLU

CONTEXTS, LENGTH = 6, 12
Score = Callable[..., SiteScore]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 96, (CONTEXTS, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def keep() -> Tensor:
    """The first token of each context and some others are not of the set."""
    mask = torch.rand(CONTEXTS, LENGTH, generator=torch.Generator().manual_seed(3)) > 0.25
    mask[:, 0] = False
    return mask


@pytest.fixture
def mean_D() -> Tensor:
    return torch.linspace(-1, 1, 16, dtype=torch.float64)


@pytest.fixture
def score(tiny_lm: Any, ids: Tensor, keep: Tensor, mean_D: Tensor) -> Score:
    def make(
        *saes: SAE, site: str = "resid_post.0", batch: int = CONTEXTS, storage: torch.dtype = torch.bfloat16
    ) -> SiteScore:
        result = SiteScore(Splice(tiny_lm, Site.parse(site)), saes, mean_D, storage, (CONTEXTS, LENGTH))
        for first in range(0, CONTEXTS, batch):
            result.batch(ids[first : first + batch], keep[first : first + batch], first)
        return result

    return make


def by_hand(model: Any, ids: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits with the output of block 0 changed by a plain hook, in no code of ours."""
    hook = model.transformer.h[0].register_forward_hook(
        lambda module, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    )
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()


def cross_entropy(logits: Tensor, ids: Tensor, keep: Tensor) -> float:
    """Mean over the kept tokens that are not first, in float64."""
    logp = logits.double().log_softmax(-1)
    terms = [
        -float(logp[row, t - 1, ids[row, t]])
        for row in range(len(ids))
        for t in range(1, ids.shape[1])
        if bool(keep[row, t])
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_mid.1", "resid_post.0", "attn_out.0", "mlp_out.1"])
def test_the_identity_costs_nothing_to_the_bit(score: Score, identity_sae: Callable[[int], ReLU], site: str) -> None:
    got = score(identity_sae(16), site=site)
    columns = got.columns(got.scores[0])
    np.testing.assert_array_equal(columns["spliced"], columns["clean"])
    assert not columns["kl"].any() and not columns["error"].any()
    metrics = got.result(samples=20, seed=0)[0]["metrics"]
    assert metrics["recovered_zero"] == {"value": 1.0, "se": 0.0}
    assert metrics["recovered_mean"] == {"value": 1.0, "se": 0.0}
    assert metrics["ce_increase"] == {"value": 0.0, "se": 0.0}
    assert metrics["nmse"]["value"] == 0 and metrics["gamma"]["value"] == 1


def test_constant_saes_are_the_ablations_to_the_bit(
    score: Score, constant_sae: Callable[[Tensor], ReLU], mean_D: Tensor
) -> None:
    got = score(constant_sae(torch.zeros(16)), constant_sae(mean_D.float()))
    zero, mean = (got.columns(each) for each in got.scores)
    np.testing.assert_array_equal(zero["spliced"], zero["zero"])
    np.testing.assert_array_equal(mean["spliced"], mean["mean"])
    zero_row, mean_row = got.result(samples=20, seed=0)
    assert zero_row["metrics"]["recovered_zero"]["value"] == 0
    assert mean_row["metrics"]["recovered_mean"]["value"] == 0
    assert zero_row["metrics"]["ce_zero"] != zero_row["metrics"]["ce_mean"]


def test_losses_equal_forwards_made_by_hand(
    score: Score, rough_sae: Callable[[int], ReLU], tiny_lm: Any, ids: Tensor, keep: Tensor, mean_D: Tensor
) -> None:
    """Known mistake 10: every ablation is at the kept positions and at no other."""
    sae = rough_sae(16)
    metrics = score(sae).result(samples=20, seed=0)[0]["metrics"]
    kept = keep[:, :, None]

    def ce(change: Callable[[Tensor], Tensor]) -> float:
        return cross_entropy(by_hand(tiny_lm, ids, change), ids, keep)

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "ce_clean": lambda x: x,
        "ce_zero": lambda x: torch.where(kept, torch.zeros(()), x),
        "ce_mean": lambda x: torch.where(kept, mean_D.float(), x),
        "ce_spliced": lambda x: torch.where(kept, sae(x.flatten(0, 1)).view_as(x), x),
    }
    expected = {name: ce(change) for name, change in changes.items()}
    for name, value in expected.items():
        assert metrics[name]["value"] == pytest.approx(value, rel=2e-6), name
    gained, lost = expected["ce_zero"] - expected["ce_spliced"], expected["ce_zero"] - expected["ce_clean"]
    assert metrics["recovered_zero"]["value"] == pytest.approx(gained / lost, rel=1e-4)
    everywhere = ce(torch.zeros_like)
    assert abs(everywhere - expected["ce_zero"]) > 1e-3  # so the positions matter in this test


def test_divergence_equals_a_forward_made_by_hand(
    score: Score, rough_sae: Callable[[int], ReLU], tiny_lm: Any, ids: Tensor, keep: Tensor
) -> None:
    sae = rough_sae(16)
    clean = by_hand(tiny_lm, ids, lambda x: x).double().softmax(-1)[:, :-1][keep[:, 1:]]
    change = lambda x: torch.where(keep[:, :, None], sae(x.flatten(0, 1)).view_as(x), x)  # noqa: E731
    spliced = by_hand(tiny_lm, ids, change).double().softmax(-1)[:, :-1][keep[:, 1:]]
    expected = float((clean * (clean / spliced).log()).sum(1).mean())
    got = score(sae).result(samples=20, seed=0)[0]["metrics"]["kl"]["value"]
    assert expected > 1e-3 and got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
def test_results_do_not_depend_on_the_batch(score: Score, rough_sae: Callable[[int], ReLU], batch: int) -> None:
    whole, parts = score(rough_sae(16)), score(rough_sae(16), batch=batch)
    one, two = whole.columns(whole.scores[0]), parts.columns(parts.scores[0])
    for name, column in one.items():
        np.testing.assert_allclose(two[name], column, rtol=1e-5, atol=1e-5, err_msg=name)
    assert whole.scores[0].firing.result() == parts.scores[0].firing.result()


def test_results_do_not_depend_on_how_many_activations_are_held(
    score: Score, rough_sae: Callable[[int], ReLU], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score(rough_sae(16))
    monkeypatch.setattr(scoring, "ACTIVATIONS_AT_ONCE", 48 * 7)
    parts = score(rough_sae(16))
    for name, column in whole.columns(whole.scores[0]).items():
        np.testing.assert_allclose(parts.columns(parts.scores[0])[name], column, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_token_set_is_the_kept_tokens(score: Score, rough_sae: Callable[[int], ReLU], keep: Tensor) -> None:
    got = score(rough_sae(16))
    columns = got.columns(got.scores[0])
    np.testing.assert_array_equal(columns["tokens"], keep.sum(1).numpy())
    np.testing.assert_array_equal(columns["predicted"], keep[:, 1:].sum(1).numpy())
    firing = got.scores[0].firing
    np.testing.assert_array_equal(firing.tokens_T.numpy(), keep.sum(0).numpy())
    assert firing.result()["by_position"][0] is None
    assert int(firing.histogram.sum()) == int(keep.sum())


def test_what_ships_is_scored_and_nothing_of_it_moves(score: Score) -> None:
    """Known mistake 11 (and 2): BatchTopK's threshold decides, not the batch, and scoring moves no state."""
    sae = BatchTopK(16, 64, k=4, input_norm="none").train()
    with torch.no_grad():
        sae.threshold.fill_(0.05)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    got = score(sae)
    l0 = got.result(samples=20, seed=0)[0]["metrics"]["l0"]["value"]
    assert l0 is not None and l0 > 8  # a low threshold lets through far more than k
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_storage_rounding_is_measured_alone(
    score: Score,
    identity_sae: Callable[[int], ReLU],
    rough_sae: Callable[[int], ReLU],
    tiny_lm: Any,
    ids: Tensor,
    keep: Tensor,
) -> None:
    found: list[Tensor] = []
    by_hand(tiny_lm, ids, lambda x: found.append(x) or x)
    x = found[0][keep]
    error = (x.double() - x.bfloat16().double()).square().sum()
    expected = float(error / (x.double() - x.double().mean(0)).square().sum())
    got = score(identity_sae(16), rough_sae(16))
    assert got.storage_nmse() == pytest.approx(expected, rel=1e-9)
    exact, rough = got.result(samples=20, seed=0)
    assert exact["storage_share"] is None  # an SAE without error has no share of it
    assert rough["storage_share"] == pytest.approx(expected / rough["metrics"]["nmse"]["value"])
    assert score(storage=torch.float32).storage_nmse() == 0


def test_a_half_precision_model_is_scored_in_its_own_dtype(
    tiny_lm: Any, ids: Tensor, keep: Tensor, mean_D: Tensor, identity_sae: Callable[[int], ReLU]
) -> None:
    import copy

    model = copy.deepcopy(tiny_lm).bfloat16()
    got = SiteScore(Splice(model, Site.parse("resid_post.0")), [identity_sae(16)], mean_D, torch.bfloat16, (6, 12))
    got.batch(ids, keep, 0)
    columns = got.columns(got.scores[0])
    np.testing.assert_array_equal(columns["spliced"], columns["clean"])
    assert got.storage_nmse() == 0


def test_the_training_form_is_the_batchs_top_k_where_it_is_asked_for(
    tiny_lm: Any, ids: Tensor, keep: Tensor, mean_D: Tensor, rough_sae: Callable[[int], ReLU]
) -> None:
    saes = [BatchTopK(16, 64, k=4, input_norm="none"), rough_sae(16)]
    with torch.no_grad():
        saes[0].threshold.fill_(0.05)
    shape = (CONTEXTS, LENGTH)
    got = SiteScore(Splice(tiny_lm, Site.parse("resid_post.0")), saes, mean_D, torch.float32, shape, "batch")
    got.batch(ids, keep, 0)
    batch, other = got.result(samples=20, seed=0)
    assert batch["metrics"]["l0"]["value"] == 4 and batch["form"] == "batch"
    assert other["form"] == "shipped"
    found: list[Tensor] = []
    by_hand(tiny_lm, ids, lambda x: found.append(x) or x)
    x = found[0][keep]
    z = (x - saes[0].b_dec) @ saes[0].W_enc + saes[0].b_enc
    bound = z.flatten().topk(4 * len(x)).values[-1]
    x_hat = torch.where(z >= bound, z, 0.0) @ saes[0].W_dec + saes[0].b_dec
    error = float((x - x_hat).detach().double().square().sum())
    assert got.columns(got.scores[0])["error"].sum() == pytest.approx(error, rel=1e-5)
