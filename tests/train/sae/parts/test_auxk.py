"""python -m pytest tests/train/sae/test_dead.py"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.sae.parts.auxk import DeadLatents, auxk_error, auxk_selector, auxk_size, default_window
from train.sae.sparse.codes import Support
from train.sae.sparse.encode import Codes
from train.sae.sparse.select import TopOfBatch, TopPerToken, select


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


def auxk(
    z: Tensor, r: Tensor, dead: Tensor, rows: Tensor, relu: bool, sparse: bool = False, over_batch: bool = False
) -> Tensor:
    """AuxK of all latents' z, through all of the dead ones' z or through those a selector keeps."""
    dead_d, k = dead.nonzero().squeeze(1), auxk_size(r.shape[1])
    z_Bd = z[:, dead_d]
    codes = Codes(z_Bd, None, tuple(z_Bd.shape))
    if sparse:
        chosen = TopOfBatch(k * len(z), positive=False) if over_batch else TopPerToken(k, positive=False)
        rows_n, latents_n, _ = select(chosen, z_Bd.detach())
        codes = Codes(z_Bd[rows_n, latents_n], Support(rows_n, latents_n, tuple(z_Bd.shape)), tuple(z_Bd.shape))
    return auxk_error(codes, r, rows[dead_d], k=k, relu=relu, over_batch=over_batch)


def error(
    z: list[list[float]], r: list[list[float]], dead: list[bool], relu: bool = False, sparse: bool = False
) -> float:
    return auxk(torch.tensor(z), torch.tensor(r), torch.tensor(dead), ROWS, relu, sparse).item()


@pytest.mark.parametrize("sparse", [False, True])
def test_auxk_by_hand(sparse: bool) -> None:
    """k_aux = 1 at D = 2. Dead: the second and third latent, though the first is larger."""
    z, r = [[9.0, 1.0, -3.0], [9.0, -2.0, -1.0]], [[0.0, 3.0], [1.0, 1.0]]
    # Taken: 1 of the second, and -1 of the third: (0, 1) and (-0.6, -0.8) against r.
    assert error(z, r, [False, True, True], sparse=sparse) == pytest.approx((2**2 + 1.6**2 + 1.8**2) / 2)
    # relu makes the second token's 0.
    assert error(z, r, [False, True, True], relu=True, sparse=sparse) == pytest.approx((2**2 + 2) / 2)


@pytest.mark.parametrize("sparse", [False, True])
def test_auxk_over_the_batch_by_hand(sparse: bool) -> None:
    """The two largest dead z of the batch are both the first token's, the second explains nothing."""
    z, r = torch.tensor([[9.0, 1.0, -0.5], [9.0, -2.0, -1.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    found = auxk(z, r, torch.tensor([False, True, True]), ROWS, False, sparse, over_batch=True)
    # 1 of the second and -0.5 of the third latent: (0, 1) + (-0.3, -0.4) against (0, 3); nothing against (1, 1).
    assert found.item() == pytest.approx((0.3**2 + 2.4**2 + 2) / 2)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_a_negative_pre_activation_gets_a_gradient_unless_relu(relu: bool, sparse: bool) -> None:
    r = torch.tensor([[1.0, 1.0]])
    z = torch.tensor([[5.0, -2.0, 5.0]], requires_grad=True)
    auxk(z, r, torch.tensor([False, True, False]), ROWS, relu, sparse).backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[0, 0 if relu else 2 * (-2 - 1), 0]]


def test_fewer_dead_than_k_aux() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, z, r = (torch.randn(n, m, generator=generator) for n, m in ((40, 16), (6, 40), (6, 16)))
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 17, 30]] = True  # k_aux = 8
    found = auxk(z, r, dead, rows, relu=False)
    wanted = (z[:, [3, 17, 30]] @ rows[[3, 17, 30]] - r).square().sum() / 6
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_auxk_is_a_true_derivative_of_z_and_rows(relu: bool, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, z = (
        torch.randn(n, m, generator=generator, dtype=torch.float64).requires_grad_() for n, m in ((12, 8), (5, 12))
    )
    r = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    dead = torch.arange(12) % 2 == 0  # 6 dead, k_aux = 4
    assert torch.autograd.gradcheck(lambda z, rows: auxk(z, r, dead, rows, relu, sparse), (z, rows))


def test_many_dead_latents_are_selected_as_z_passes() -> None:
    assert auxk_selector(512, 8 * 512) is None
    selector = auxk_selector(512, 8 * 512 + 1)
    assert isinstance(selector, TopPerToken) and selector.k == 512 and not selector.positive
    selector = auxk_selector(512, 8 * 512 + 1, 100)
    assert isinstance(selector, TopOfBatch) and selector.count == 51200 and not selector.positive


def test_an_undetached_residual_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="must not change"):
        auxk(torch.ones(1, 3), torch.ones(1, 2, requires_grad=True), torch.tensor([True, False, False]), ROWS, False)
