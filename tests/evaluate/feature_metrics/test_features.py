"""Bases, patterns and ablations on a tiny LM, against plain formulas and latents whose pattern is known beforehand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.base.errors import UserError
from data.base.sites import Site
from evaluate.feature_metrics.ablation import AFTER, ablate, downstream, places, sparsity
from evaluate.feature_metrics.bases import Basis, BasisReader, Directions, SAEBasis, neurons_before
from evaluate.feature_metrics.patterns import (
    ANY,
    LONGEST,
    activation_at_end,
    examples,
    explain,
    foretold,
    patterns,
    substitutes,
)
from evaluate.feature_metrics.probe import interval, make_questions, probe
from evaluate.feature_metrics.sample import FeatureText, draw, take
from evaluate.feature_metrics.tasks import Task
from evaluate.inputs import HeldoutText
from harvest.packing import PackedTokens
from train.sae.variants.batchtopk import BatchTopK
from train.sae.variants.gated import Gated
from train.sae.variants.topk import TopK

SITE = Site.parse("resid_post.0")


def quiet(*_: Any) -> None:
    return None


@pytest.fixture
def held(tiny_lm: Any) -> FeatureText:
    """24 contexts of a BOS and 30 tokens, one of them excluded here and there."""
    ids = np.random.default_rng(0).integers(1, 12, (24, 31)).astype(np.int32)
    ids[:, 0] = 0
    reader = BasisReader(tiny_lm, SITE, neurons_before(tiny_lm, SITE, torch.from_numpy(ids[:1]).long()))
    starts = np.arange(0, 24 * 30, 45)  # documents of one and a half contexts
    packed = PackedTokens(ids, ids > 0, starts, [str(start) for start in starts], stride=30)
    return FeatureText(HeldoutText(tiny_lm, packed, Words(), 5), reader, 0)


class Words:
    def __len__(self) -> int:
        return 12

    def decode(self, ids: list[int]) -> str:
        return "".join("_abcdefghijk"[i] for i in ids)


class After(Basis):
    """Fires by 1 on token 3, and by 2 on token 5 where token 4 came two before it; sees ids, not activations."""

    def __init__(self) -> None:
        super().__init__("after", 3)

    def values(self, x_ND: Tensor, units: slice) -> Tensor:
        return self.active(x_ND)[:, units]

    def active(self, x_ND: Tensor) -> Tensor:
        two, _, own = x_ND.unbind(1)
        return torch.stack([(own == 3).float(), 2.0 * ((own == 5) & (two == 4)), torch.zeros_like(own)], 1)

    def part(self, x_ND: Tensor, f_N: Tensor, unit_N: Tensor) -> Tensor:
        raise NotImplementedError


class Ids:
    """A reader whose activations are the last three ids."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def read(self, ids_BT: Tensor) -> dict[bool, Tensor]:
        padded = torch.cat([torch.zeros(len(ids_BT), 2, dtype=torch.int64), ids_BT], 1)
        return {False: padded.unfold(1, 3, 1).float()}


@pytest.fixture
def spelt(held: FeatureText) -> FeatureText:
    return FeatureText(held.heldout, Ids(held.reader.model), 0)  # type: ignore[arg-type]


def test_patterns_find_what_the_latents_look_for(spelt: FeatureText) -> None:
    units = torch.arange(3)
    found = examples(spelt, After(), units, 6, 0, quiet)
    assert set(found.f_n[found.unit_n == 0].tolist()) == {1.0} and set(found.f_n[found.unit_n == 1].tolist()) == {2.0}
    at_end = activation_at_end(spelt, After(), units, quiet)
    others = torch.tensor([6, 7, 8])
    assert patterns(found, at_end, others, 0)[:2] == [{(3,)}, {(4, ANY, 5)}]
    kwargs: dict[str, Any] = {
        "units": 3,
        "count": 6,
        "bootstrap": 20,
        "seed": 0,
        "on_progress": quiet,
        "on_forward": quiet,
    }
    got = explain(spelt, After(), **kwargs)
    assert got["units"] == 3 and got["tested"] == 2
    assert [got[name]["value"] for name in ("precision", "recall", "recall_activation", "f1")] == [1, 1, 1, 1]


def test_examples_do_not_depend_on_the_batch_and_are_of_the_first_half(spelt: FeatureText) -> None:
    found = examples(spelt, After(), torch.arange(3), 4, 0, quiet)
    assert int((found.unit_n == 0).sum()) == 4
    first = spelt.packed.contexts[:12]
    for ids in found.ids_nL.tolist():
        own = [token for token in ids if token != ANY]
        assert any(own == row[: len(own)].tolist() or own in _windows(row) for row in first)
    assert len({tuple(ids) for ids in found.ids_nL.tolist()}) == len(found.ids_nL)


def _windows(row: np.ndarray[Any, Any]) -> list[list[int]]:
    return [row[at : at + LONGEST].tolist() for at in range(len(row) - LONGEST + 1)]


def test_no_token_stands_in_for_itself() -> None:
    """At a token share of a half every second draw would be the token itself."""
    others = torch.tensor([3, 3, 4, 5])
    ids = torch.tensor([3] * 400 + [5] * 400 + [9] * 400)
    drawn = substitutes(others, ids, torch.Generator().manual_seed(0))
    assert not (drawn == ids).any()
    assert set(drawn[:400].tolist()) == {4, 5} and set(drawn[800:].tolist()) == {3, 4, 5}
    assert abs((drawn[400:800] == 3).float().mean() - 2 / 3) < 0.1  # the shares of the others stay as they are
    assert substitutes(torch.tensor([7, 7]), torch.tensor([7, 2]), torch.Generator()).tolist() == [7, 7]


def test_foretold_worked_by_hand() -> None:
    ids = torch.tensor([[1, 2, 1, 3], [2, 2, 2, 1]])
    assert foretold(ids, {(1, ANY, 1)}).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert foretold(ids, {(2, 1), (3,)}).tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert not foretold(ids, set()).any() and not foretold(ids, {(1, 2, 1, 3, 1)}).any()


def test_precision_and_recall_of_an_incomplete_pattern(spelt: FeatureText, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns (3) and (6) for a latent that fires on 3 and on 5: by counts over the second half."""
    monkeypatch.setattr("evaluate.feature_metrics.patterns.patterns", lambda *_: [{(3,), (6,)}, set(), set()])
    kwargs: dict[str, Any] = {
        "units": 3,
        "count": 6,
        "bootstrap": 20,
        "seed": 0,
        "on_progress": quiet,
        "on_forward": quiet,
    }
    (first, second) = explain(spelt, After(), **kwargs)["of_units"]
    half = spelt.packed.contexts[12:]
    threes, sixes = int((half == 3).sum()), int((half == 6).sum())
    assert first["recall"] == 1 and first["precision"] == pytest.approx(threes / (threes + sixes))
    assert (second["precision"], second["recall"]) == (0, 0)


def test_sparsity_worked_by_hand() -> None:
    one = torch.zeros(1, 2, 5)
    one[0, 0, 3] = 4.0  # one of ten values moves
    assert float(sparsity(one)) == pytest.approx(1 / 10)
    assert float(sparsity(one + 7)) == pytest.approx(1 / 10)  # a constant at every logit moves nothing
    pair = torch.tensor([[[0.0, 0.0, 0.0, 3.0, 4.0]]])
    assert float(sparsity(pair)) == pytest.approx(49 / 25 / 5)
    assert bool(sparsity(torch.ones(1, 2, 5)).isnan())


def saes() -> list[Any]:
    found: list[Any] = [TopK(16, 48, k=6), Gated(16, 48, sparsity=0.1), TopK(16, 48, k=6, input_norm="token")]
    found.append(BatchTopK(16, 48, k=6))
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1)) * 3 + 1
    for sae in found:
        sae.initialise(x)
    return found


@pytest.mark.parametrize("number", range(4))
def test_parts_add_up_to_the_reconstruction(number: int) -> None:
    basis, x = SAEBasis("it", saes()[number]), torch.randn(9, 16, generator=torch.Generator().manual_seed(2)) * 3 + 1
    with torch.no_grad():
        f, x_hat = basis.sae.encode_decode(x)
        empty = basis.sae.norm.denormalise(basis.sae.b_dec.expand_as(x), x)
        total = empty.clone()
        for unit in range(48):
            total += basis.part(x, f[:, unit], torch.full((9,), unit))
        torch.testing.assert_close(total, x_hat, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(basis.active(x), f)
        xn = basis.sae.norm.normalise(x)
        torch.testing.assert_close(basis.values(x, slice(5, 30)), basis.sae.pre_activation(xn)[:, 5:30])


def test_directions_are_active_as_often_as_asked() -> None:
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(3)) + 2
    basis = Directions("channels", None, x.mean(0), torch.eye(8), x, 0.05)
    assert (basis.active(x) > 0).sum(0).tolist() == [50] * 8
    moved = x - basis.part(x, basis.values(x, slice(2, 3))[:, 0], torch.full((1000,), 2))
    torch.testing.assert_close(moved[:, 2], x.mean(0)[2].expand(1000))


def test_neurons_add_what_the_mlp_does(tiny_lm: Any, held: FeatureText) -> None:
    neurons = held.reader.neurons
    assert neurons is not None
    ids = torch.from_numpy(held.packed.contexts[:2]).long()
    h = held.reader.read(ids)[True]
    out = BasisReader(tiny_lm, Site("mlp_out", 0), None).read(ids)[False]
    torch.testing.assert_close(h @ neurons.out_HD + tiny_lm.transformer.h[0].mlp.c_proj.bias, out, rtol=1e-4, atol=1e-4)
    before = neurons_before(tiny_lm, Site("resid_pre", 1), ids)
    assert before is not None and before.linear is neurons.linear
    assert neurons_before(tiny_lm, Site("attn_out", 1), ids) is None
    assert neurons_before(tiny_lm, Site("resid_pre", 0), ids) is None


def test_an_ablation_equals_two_forwards_made_by_hand(tiny_lm: Any, held: FeatureText) -> None:
    basis = SAEBasis("it", saes()[0])
    with torch.no_grad():
        got = ablate(held, basis, (15, 9), 100, np.random.default_rng(0))
        ids = torch.from_numpy(held.packed.contexts[15:16]).long()
        x = held.reader.read(ids)[False][:, 9]
        active = basis.active(x)[0].nonzero()[:, 0].tolist()
        clean = tiny_lm(input_ids=ids, use_cache=False).logits[0, 9 : 9 + AFTER + 1].double()
        expected = []
        for unit in active:
            part = basis.part(x, basis.active(x)[:, unit], torch.tensor([unit]))

            def change(module: Any, args: Any, out: Any, part: Tensor = part) -> Any:
                x_BTD = out[0] if isinstance(out, tuple) else out
                x_BTD = x_BTD.clone()
                x_BTD[:, 9] -= part
                return (x_BTD, *out[1:]) if isinstance(out, tuple) else x_BTD

            hook = tiny_lm.transformer.h[0].register_forward_hook(change)
            d = tiny_lm(input_ids=ids, use_cache=False).logits[0, 9 : 9 + AFTER + 1].double() - clean
            hook.remove()
            d = d - d.sort(-1).values[:, (d.shape[1] - 1) // 2, None]
            expected.append(float(d.abs().sum() ** 2 / (d**2).sum() / d.numel()))
    assert len(active) == 6
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3)


def test_places_leave_room_and_short_contexts_are_refused(held: FeatureText) -> None:
    found = places(held, 8, 0)
    assert len(found) == 8 and len({context for context, _ in found}) == 8
    assert all(context >= 12 and 1 <= position < 31 - AFTER for context, position in found)
    counts: dict[str, Any] = {"contexts": 3, "count": 2, "bootstrap": 20, "seed": 0, "on_progress": quiet}
    with torch.no_grad():
        got = downstream(held, SAEBasis("it", saes()[0]), **counts)
    assert got["ablations"] == 6 and 0 < got["fraction"]["low"] <= got["fraction"]["value"] < 1
    packed = PackedTokens(held.packed.contexts[:, :16], held.packed.keep[:, :16])
    with pytest.raises(UserError, match="looks 16 tokens ahead and contexts have 16"):
        places(FeatureText(dataclasses.replace(held.heldout, packed=packed), held.reader, 0), 8, 0)


def test_the_sample_is_of_kept_tokens_without_repetition(held: FeatureText) -> None:
    sequence, position = draw(held.packed.keep, range(12, 24), 100, 0)
    assert len(sequence) == 100 == len(set(zip(sequence.tolist(), position.tolist(), strict=True)))
    assert held.packed.keep[sequence, position].all() and (np.diff(sequence) >= 0).all() and sequence.min() >= 12
    assert len(draw(held.packed.keep, range(12), 10**6, 0)[0]) == held.packed.keep[:12].sum()
    got = take(held, range(12), 50, 0, quiet)
    ids = torch.from_numpy(held.packed.contexts[:12]).long()
    expected = held.reader.read(ids)[False][got.sequence_M, got.position_M]
    torch.testing.assert_close(got.reads[False], expected, rtol=1e-4, atol=1e-5)


def test_probes_choose_on_one_half_and_score_on_the_other(spelt: FeatureText) -> None:
    samples = tuple(take(spelt, spelt.half(half), 300, 0, quiet) for half in (False, True))
    import re

    tasks = [Task("is c", "token", re.compile("c")), Task("never", "token", re.compile("z"))]
    questions = make_questions(spelt, tasks, samples)  # type: ignore[arg-type]
    assert questions.names == ["is c"] and questions.left_out == ["never"]
    counted: list[int] = []
    got = probe(After(), samples, questions, bootstrap=20, seed=0, on_progress=counted.append)  # type: ignore[arg-type]
    task = got["tasks"]["is c"]  # token 3 is "c", and unit 0 fires just there
    assert task["unit"] == 0 and task["loss"] < 1e-3 and counted == [3]
    rate = float((spelt.packed.contexts[samples[0].sequence_M, samples[0].position_M] == 3).mean())
    share = float((spelt.packed.contexts[samples[1].sequence_M, samples[1].position_M] == 3).mean())
    assert task["loss_base_rate"] == pytest.approx(-share * np.log(rate) - (1 - share) * np.log(1 - rate))
    assert got["loss"]["value"] == pytest.approx(task["loss"])


def test_the_interval_of_a_mean_is_the_analytic_one() -> None:
    values = np.random.default_rng(0).exponential(size=500)
    items = np.stack([values, np.ones(500)], 1)
    got = interval(items, lambda drawn: float(drawn[0] / drawn[1]), 2000, 1)
    assert got["value"] == pytest.approx(values.mean())
    assert got["se"] == pytest.approx(values.std() / 500**0.5, rel=0.06)
    assert interval(items[:0], lambda drawn: float(drawn[0] / drawn[1]), 10, 1)["value"] is None
