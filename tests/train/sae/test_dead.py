"""python -m pytest tests/train/sae/test_dead.py"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.sae.dead import DeadLatents, auxk_error, auxk_size, default_window


def test_counters_by_hand() -> None:
    dead = DeadLatents(3)
    dead.update(torch.tensor([True, False, False]), 10)
    dead.update(torch.tensor([False, True, False]), 5)
    assert dead.since_F.tolist() == [5, 0, 15]
    assert dead.mask(5).tolist() == [True, False, True]
    assert dead.mask(6).tolist() == [False, False, True]
    assert dead.state_dict()["since_F"].tolist() == [5, 0, 15]


def test_counters_hold_long_runs() -> None:
    dead = DeadLatents(1)
    dead.since_F.fill_(2**40)
    dead.update(torch.tensor([False]), 4096)
    assert dead.since_F.item() == 2**40 + 4096


@pytest.mark.parametrize(("tokens", "window"), [(500_000, 50_000), (10**9, 10_000_000), (3, 1)])
def test_the_default_window(tokens: int, window: int) -> None:
    assert default_window(tokens) == window


@pytest.mark.parametrize(
    ("d_in", "k"), [(768, 512), (2304, 1024), (192, 128), (64, 32), (128, 64), (16, 8), (2, 1), (1, 1)]
)
def test_the_size_of_auxk(d_in: int, k: int) -> None:
    assert auxk_size(d_in) == k  # log2(384) = 8.58, log2(1152) = 10.17, log2(96) = 6.58


ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])


def error(z: list[list[float]], r: list[list[float]], dead: list[bool], relu: bool = False) -> float:
    return auxk_error(torch.tensor(z), torch.tensor(r), torch.tensor(dead), ROWS, relu=relu).item()


def test_auxk_by_hand() -> None:
    """k_aux = 1 at D = 2. Dead: the second and third latent, though the first is larger."""
    z, r = [[9.0, 1.0, -3.0], [9.0, -2.0, -1.0]], [[0.0, 3.0], [1.0, 1.0]]
    # Taken: 1 of the second, and -1 of the third: (0, 1) and (-0.6, -0.8) against r.
    assert error(z, r, [False, True, True]) == pytest.approx((2**2 + 1.6**2 + 1.8**2) / 2)
    # relu makes the second token's 0.
    assert error(z, r, [False, True, True], relu=True) == pytest.approx((2**2 + 2) / 2)
    assert error(z, r, [False, False, False]) == 0


def test_a_negative_pre_activation_gets_a_gradient_unless_relu() -> None:
    r = torch.tensor([[1.0, 1.0]])
    for relu in (False, True):
        z = torch.tensor([[5.0, -2.0, 5.0]], requires_grad=True)
        auxk_error(z, r, torch.tensor([False, True, False]), ROWS, relu=relu).backward()
        assert z.grad is not None
        assert z.grad.tolist() == [[0, 0 if relu else 2 * (-2 - 1), 0]]


def test_fewer_dead_than_k_aux() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, z, r = (torch.randn(n, m, generator=generator) for n, m in ((40, 16), (6, 40), (6, 16)))
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 17, 30]] = True  # k_aux = 8
    found = auxk_error(z, r, dead, rows, relu=False)
    wanted = (z[:, [3, 17, 30]] @ rows[[3, 17, 30]] - r).square().sum() / 6
    torch.testing.assert_close(found, wanted)


def test_auxk_is_a_true_derivative_of_z_and_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, z = (
        torch.randn(n, m, generator=generator, dtype=torch.float64).requires_grad_() for n, m in ((12, 8), (5, 12))
    )
    r = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    dead = torch.arange(12) % 2 == 0  # 6 dead, k_aux = 4

    def signed(z: Tensor, rows: Tensor) -> Tensor:
        return auxk_error(z, r, dead, rows, relu=False)

    def reference(z: Tensor, rows: Tensor) -> Tensor:
        return auxk_error(z, r, dead, rows, relu=True)

    assert torch.autograd.gradcheck(signed, (z, rows))
    assert torch.autograd.gradcheck(reference, (z, rows))


def test_an_undetached_residual_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="must not change"):
        auxk_error(torch.ones(1, 3), torch.ones(1, 2, requires_grad=True), None, ROWS, relu=False)
