"""python -m pytest -m slow tests/train/sae/sparse/test_candidates.py: a choice without z is that from all of z.

On a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from train.sae.sparse.candidates import can_sample, find_candidates, lower_bound
from train.sae.sparse.product import Product
from train.sae.sparse.rules import Entries, Selection, TopOfBatch, TopPerToken
from train.sae.sparse.triton import TritonBackend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITHOUT_Z, PLAIN = TritonBackend(candidates_from=0), TritonBackend()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def product(
    rows: int, width: int, *, d: int = 5, dtype: torch.dtype = torch.float64, bias: bool = True, **how: Any
) -> Product:
    x, W = draw(rows, d, seed=1, dtype=dtype), draw(width, d, seed=2, dtype=dtype)
    return Product(x, W, draw(width, seed=3, dtype=dtype) if bias else None, **how)


def of_z(z_BF: Tensor) -> Product:
    """A product whose z is given: x is the identity."""
    return Product(torch.eye(len(z_BF), dtype=z_BF.dtype, device=DEVICE), z_BF.t().contiguous().to(DEVICE), None)


def rules(rows: int, k: int = 3) -> list[TopPerToken | TopOfBatch]:
    return [TopPerToken(k), TopOfBatch(k * rows)]


def assert_same(given: Product, rule: TopPerToken | TopOfBatch, *, certain: bool, rtol: float = 1e-12) -> None:
    found = find_candidates(given, rule, WITHOUT_Z)
    assert bool(found.certain) == certain
    plain = given
    if given.matmul == "bf16":  # a CPU may leave so small a product in float32
        plain = Product(given.xc_BD.bfloat16().float(), given.W_enc_FD.bfloat16().float(), given.bias_F)
    entries, wanted = WITHOUT_Z.select(given, [Selection(rule)])[0], PLAIN.select(plain, [Selection(rule)])[0]
    assert isinstance(entries, Entries) and isinstance(wanted, Entries)
    assert torch.equal(entries.rows_n, wanted.rows_n) and torch.equal(entries.latents_n, wanted.latents_n)
    torch.testing.assert_close(entries.values_n, wanted.values_n, rtol=rtol, atol=rtol, equal_nan=True)


@pytest.mark.parametrize("how", ["float64", "float32", "bf16", "no bias", "D of two pieces"])
def test_the_choice_is_that_from_all_of_z(how: str) -> None:
    """Tokens and latents of two tiles and odd numbers, with D no power of two."""
    options: dict[str, dict[str, Any]] = {
        "float64": {},
        "float32": {"dtype": torch.float32},
        "bf16": {"dtype": torch.float32, "matmul": "bf16"},
        "no bias": {"bias": False},
        "D of two pieces": {"d": 37},
    }
    for rule in rules(70):
        assert_same(product(70, 391, **options[how]), rule, certain=True, rtol=1e-12 if how == "float64" else 1e-5)


def test_ties_at_the_bound_and_across_tiles_go_to_the_lowest_index() -> None:
    z = draw(9, 391, seed=4).round()
    for rule in rules(9):
        assert_same(of_z(z), rule, certain=bool(find_candidates(of_z(z), rule, WITHOUT_Z).certain))
    z = -draw(9, 391, seed=5).abs() - 2
    z[:, [100, 127, 128, 300]] = 1.0  # three of them in the first two tiles
    z[:, ::16] = 0.5  # the sample's bound lies below
    for rule in rules(9):
        assert_same(of_z(z), rule, certain=True)


def test_what_cannot_be_certain_is_chosen_from_all_of_z() -> None:
    equal = torch.zeros(9, 391, dtype=torch.float64)  # all of them reach the bound
    narrow = draw(9, 391, seed=6)
    narrow[:, ::16] = -100.0  # all but the sample do
    broken = draw(9, 391, seed=7)
    broken[4, 200] = torch.nan
    for z in (equal, narrow, broken):
        for rule in rules(9):
            # NaN times 0 is NaN: a product with the identity spreads it over its latent.
            assert_same(of_z(z), rule, certain=False)


def test_a_token_without_candidates_and_one_with_most_of_them() -> None:
    z = draw(9, 391, seed=8)
    z[2], z[5] = -50.0 + z[2], z[5] + 3
    assert_same(of_z(z), TopOfBatch(27), certain=True)
    assert_same(of_z(z), TopPerToken(3), certain=True)


def test_a_bound_is_reached_by_as_many_values_as_are_chosen() -> None:
    values = draw(4, 96, seed=9)
    for count in (1, 2, 3, 24, 96):
        bound = lower_bound(values, count)
        assert bool(((values >= bound[:, None]).sum(1) >= count).all())
    assert lower_bound(values, 1).tolist() == values.amax(1).tolist()


def test_a_sample_too_small_leaves_the_choice_to_z() -> None:
    assert can_sample(TopPerToken(3), 9, 48) and not can_sample(TopPerToken(4), 9, 48)
    assert can_sample(TopOfBatch(27), 9, 48) and not can_sample(TopOfBatch(28), 9, 48)
    assert not PLAIN.takes_candidates(TopPerToken(3), 9, 48)
    assert WITHOUT_Z.takes_candidates(TopPerToken(3), 9, 48)
    assert not TritonBackend(candidates_from=433).takes_candidates(TopPerToken(3), 9, 48)
