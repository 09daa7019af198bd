"""python -m pytest tests/train/sae/test_contract.py: what every variant owes its trainer and its user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from tests.helpers.slow import slow_unless
from tests.helpers.toy import FORMS, D, F, activations, f_of, make, train, train_step
from train.sae import SAE, VARIANTS, TrainContext, load, save


def state(sae: SAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", FORMS)
class TestContract:
    @pytest.mark.parametrize("norm", ["none", "dataset", "token"])
    def test_saved_and_loaded_it_is_the_same_bit_for_bit(self, form: str, norm: str, tmp_path: Path) -> None:
        sae, x = make(form, input_norm=norm), activations(64, seed=5)
        train(sae, 3)
        save(sae, tmp_path, {"site": "resid_post.3"})
        loaded = load(tmp_path)
        assert type(loaded) is type(sae)
        assert equal(state(loaded), state(sae))
        assert loaded.settings() == sae.settings()
        for ours, theirs in zip(sae.encode_decode(x), loaded.encode_decode(x), strict=True):
            assert torch.equal(ours, theirs)
        xn = sae.norm.normalise(x)
        assert torch.equal(sae.loss(xn).loss, loaded.loss(xn).loss)

    def test_settings_are_json_and_build_the_same_form(self, form: str) -> None:
        sae = make(form)
        settings = json.loads(json.dumps(sae.settings()))
        assert settings == sae.settings()
        again = type(sae)(**settings)
        again.load_state_dict(sae.state_dict())
        x = activations(32, seed=6)
        assert torch.equal(again(x), sae(x))

    def test_nothing_but_the_training_step_changes_state(self, form: str) -> None:
        sae, x = make(form), activations(64, seed=5)
        before, random = state(sae), torch.get_rng_state()
        dead_F = torch.arange(F) < 5
        sae.loss(sae.norm.normalise(x), TrainContext(dead_F=dead_F)).loss.backward()
        sae.encode(x)
        sae.encode_decode(x)
        sae(x)
        assert equal(state(sae), before)
        assert torch.equal(torch.get_rng_state(), random)

    def test_the_loss_is_a_function_of_its_batch(self, form: str) -> None:
        sae, xn = make(form), activations(64, seed=5)
        assert torch.equal(sae.loss(xn).loss, sae.loss(xn).loss)

    def test_what_ships_treats_each_token_by_itself_in_either_mode(self, form: str) -> None:
        sae, x = make(form), activations(64, seed=5)
        f = sae.train().encode(x)
        assert torch.equal(sae.eval().encode(x), f)
        assert torch.equal(f, sae.encode_normalised(sae.norm.normalise(x)))
        alone = torch.cat([sae.encode(row[None]) for row in x])
        assert torch.equal(alone > 0, f > 0)
        torch.testing.assert_close(alone, f)
        assert (f >= 0).all()

    def test_run_is_encode_and_forward(self, form: str) -> None:
        sae, x = make(form), activations(64, seed=5)
        f, x_hat = sae.encode_decode(x)
        assert torch.equal(f, sae.encode(x))
        assert torch.equal(x_hat, sae(x))
        torch.testing.assert_close(x_hat, (f @ sae.W_dec + sae.b_dec) / sae.norm.scale)

    def test_any_leading_shape_gives_the_same_numbers_and_no_gradient(self, form: str) -> None:
        sae, x = make(form), activations(60, seed=5)
        f, x_hat = sae.encode_decode(x)
        folded = x.view(3, 4, 5, D)
        for found, flat in (
            (sae.encode(folded), f),
            (sae(folded), x_hat),
            (sae.decode(f.view(3, 4, 5, F)), sae.decode(f)),
            (sae.encode(x[0]), f[0]),
        ):
            torch.testing.assert_close(found.reshape(flat.shape), flat)
            assert not found.requires_grad
        torch.testing.assert_close(sae.decode(f), x_hat)
        with pytest.raises(UserError, match=r"reads 16 entries a token and got \[60, 64\]"):
            sae.encode(f)
        with pytest.raises(UserError, match=r"has 64 latents and decode got 16"):
            sae.decode(x)

    def test_rows_are_unit_after_each_step_where_the_variant_says_so(self, form: str) -> None:
        sae = make(form)
        train(sae, 5)
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
        if sae.unit_rows:
            torch.testing.assert_close(norms, torch.ones(F), rtol=0, atol=2e-7)
        else:
            assert (norms - 1).abs().max() > 1e-3

    def test_one_training_step_lowers_the_loss(self, form: str) -> None:
        sae, x = make(form), activations(512, seed=5)
        before = train_step(sae, torch.optim.Adam(sae.parameters(), lr=1e-3), x).loss.item()
        assert sae.loss(sae.norm.normalise(x)).loss.item() < before

    def test_parts_are_detached_scalars_that_add_up(self, form: str) -> None:
        sae = make(form)
        step = sae.loss(sae.norm.normalise(activations(64, seed=5)), TrainContext(dead_F=torch.arange(F) < 5))
        assert {"nmse", "l0"} <= step.metrics.keys()
        assert all(part.shape == () and not part.requires_grad for part in step.metrics.values())
        assert not step.codes.values.requires_grad
        assert step.metrics["l0"].item() == pytest.approx((f_of(step) > 0).sum().item() / 64)
        if form.startswith("matryoshka"):  # its reconstruction's term is the sum over prefixes
            return
        terms = sum(
            part for name, part in step.metrics.items() if name not in ("l0", "min_kept", "threshold", "coefficient")
        )
        torch.testing.assert_close(terms, step.loss.detach())

    def test_fired_marks_the_latents_of_the_training_form(self, form: str) -> None:
        step = make(form).loss(activations(8, seed=5))
        assert torch.equal(step.fired_F, (f_of(step) > 0).any(0))

    def test_zero_dead_latents_are_zero_auxk_and_not_nan(self, form: str) -> None:
        sae, xn = make(form), activations(64, seed=5)
        plain, none = sae.loss(xn), sae.loss(xn, TrainContext(dead_F=torch.zeros(F, dtype=torch.bool)))
        assert torch.equal(plain.loss, none.loss)
        assert none.loss.isfinite()
        assert ("auxk" in none.metrics) == sae.uses_auxk
        if sae.uses_auxk:
            assert none.metrics["auxk"] == 0

    def test_auxk_reaches_the_encoder_of_dead_latents_where_there_is_auxk(self, form: str) -> None:
        sae, xn = make(form), activations(64, seed=5)
        dead_F = torch.arange(F) < 6  # fewer than k_aux = 8: each is taken for every token
        if sae.uses_auxk:  # silence them: for the reference form, which needs z > 0, just below the k-th largest
            with torch.no_grad():
                sae.get_parameter("b_enc")[dead_F] -= 0.5 if "reference" in form else 50.0
        plain, revived = sae.loss(xn), sae.loss(xn, TrainContext(dead_F=dead_F))
        (before,) = torch.autograd.grad(plain.loss, sae.W_enc_FD)
        (after,) = torch.autograd.grad(revived.loss, sae.W_enc_FD)
        reached_F = ((after - before).abs() > 1e-7).any(1)
        assert torch.equal(reached_F, dead_F if sae.uses_auxk else torch.zeros_like(dead_F))

    def test_parameters_are_float32_whatever_the_store_holds(self, form: str) -> None:
        sae, x = make(form), activations(64, seed=5).bfloat16()
        assert {p.dtype for p in sae.parameters()} == {torch.float32}
        f, x_hat = sae.encode_decode(x)
        assert (f.dtype, x_hat.dtype) == (torch.float32, torch.float32)
        step = sae.loss(sae.norm.normalise(x))
        assert step.loss.dtype == torch.float32

    def test_the_start_depends_on_the_seed_alone(self, form: str) -> None:
        a, b = make(form), make(form)
        assert equal(state(a), state(b))
        b.initialise(activations(2048), seed=1)
        assert not torch.equal(a.W_dec, b.W_dec)

    def test_parameters_share_no_memory(self, form: str) -> None:
        name, own = FORMS[form]
        sae = VARIANTS[name](1, F, **own)
        assert len({p.data_ptr() for p in sae.parameters()}) == len(list(sae.parameters()))


def test_every_variant_is_in_the_contract() -> None:
    assert {name for name, _ in FORMS.values()} == VARIANTS.keys()
    assert all(VARIANTS[name].name == name for name in VARIANTS)


@pytest.mark.parametrize("form", slow_unless(VARIANTS.__contains__, FORMS))
def test_training_explains_the_toy(form: str) -> None:
    sae = make(form)
    first, last = train(sae, 150)[::149]
    assert last.metrics["nmse"] < 0.6 * first.metrics["nmse"]
    held = activations(1024, seed=7)
    error = (held - sae(held)).square().sum() / (held - held.mean(0)).square().sum()
    assert error < 0.25


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("topk", {"k": 65}, "k=65 .* width of 64"),
        ("batchtopk", {"k": 0}, "k=0 .* greater than or equal to 1"),
        ("matryoshka", {"k": 100}, "k=100 "),
        ("topk", {"k": 17, "multi_topk": True}, "4k=68 .* width of 64"),
        ("batchtopk", {"k": 4, "auxk_norm": "mean"}, "auxk_norm=mean .*'residual' or 'variance'"),
        ("batchtopk", {"k": 4, "auxk_alpha": -1.0}, "auxk_alpha=-1"),
        ("matryoshka", {"k": 4, "prefixes": [0.5]}, "end with 1"),
        ("matryoshka", {"k": 4, "prefixes": []}, "end with 1"),
        ("matryoshka", {"k": 4, "prefixes": [0.5, 0.25, 1.0]}, "increasing"),
        ("matryoshka", {"k": 4, "prefixes": [0.001, 0.002, 1.0]}, r"\[1, 1, 64\]"),
        ("relu", {"sparsity": 0.1, "form": "may"}, "form=may .*'april' or 'bricken'"),
        ("relu", {"sparsity": -0.1}, "sparsity=-0.1"),
        ("gated", {"sparsity": float("nan")}, "sparsity=nan"),
        ("jumprelu", {"sparsity": float("inf")}, "sparsity=inf"),
        ("jumprelu", {"sparsity": 0.1, "bandwidth": 0.0}, "bandwidth=0"),
        ("jumprelu", {"sparsity": 0.1, "initial_threshold": -1.0}, "initial_threshold=-1"),
        ("jumprelu", {"sparsity": 0.1, "k": 65.0}, "target_l0=65"),
        ("topk", {"k": 4, "input_norm": "batch"}, "input_norm=batch .*'none', 'dataset' or 'token'"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        VARIANTS[name](D, F, **settings)


def test_an_impossible_size_is_refused() -> None:
    with pytest.raises(UserError, match="width=0"):
        VARIANTS["topk"](D, 0, k=1)


def test_token_normalised_activations_are_decoded_with_their_input() -> None:
    sae, x = make("topk", input_norm="token"), activations(6)
    f, x_hat = sae.encode_decode(x)
    torch.testing.assert_close(sae.decode(f, x), x_hat)
    with pytest.raises(UserError, match=r"call decode\(f, x\)"):
        sae.decode(f)
