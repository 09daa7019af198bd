"""Dead latents' counters, and AuxK against values worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.sae.parts.auxk import DeadLatents, auxk_error, auxk_rule, auxk_size, default_window, filled_up
from train.sae.sparse.backend import use_backend
from train.sae.sparse.codes import Codes, Support
from train.sae.sparse.cpu import select
from train.sae.sparse.rules import Everything, TopPerToken
from train.sae.sparse.triton import TritonBackend


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


def auxk(z: Tensor, r: Tensor, dead: Tensor, rows: Tensor, relu: bool, sparse: bool = False) -> Tensor:
    """AuxK of all latents' z, through all of the dead ones' z or through those a rule keeps."""
    dead_d, k = dead.nonzero().squeeze(1), auxk_size(r.shape[1])
    z_Bd = z[:, dead_d]
    codes = Codes(z_Bd, None, tuple(z_Bd.shape))
    if sparse:
        rows_n, latents_n, _ = select(TopPerToken(k, positive=False), z_Bd.detach())
        codes = Codes(z_Bd[rows_n, latents_n], Support(rows_n, latents_n, tuple(z_Bd.shape)), tuple(z_Bd.shape))
    return auxk_error(codes, r, rows[dead_d], k=k, relu=relu)


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
@pytest.mark.parametrize("relu", [False, True])
def test_a_negative_pre_activation_gets_a_gradient_unless_relu(relu: bool, sparse: bool) -> None:
    r = torch.tensor([[1.0, 1.0]])
    z = torch.tensor([[5.0, -2.0, 5.0]], requires_grad=True)
    auxk(z, r, torch.tensor([False, True, False]), ROWS, relu, sparse).backward()
    assert z.grad is not None
    assert z.grad.tolist() == [[0, 0 if relu else 2 * (-2 - 1), 0]]


@pytest.mark.parametrize("sparse", [False, True])
def test_ties_go_to_the_lowest_index(sparse: bool) -> None:
    """All 400 dead latents of a token have one z: the first eight are taken."""
    generator = torch.Generator().manual_seed(0)
    rows, r = torch.randn(400, 16, generator=generator), torch.randn(3, 16, generator=generator)
    z = torch.tensor([[2.0], [-1.0], [0.0]]).expand(3, 400)
    found = auxk(z, r, torch.ones(400, dtype=torch.bool), rows, False, sparse)
    torch.testing.assert_close(found, (z[:, :8] @ rows[:8] - r).square().sum() / 3)


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
    assert auxk_rule(512, few=True) == Everything()
    assert auxk_rule(512, few=False) == TopPerToken(512, positive=False)


def test_an_undetached_residual_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="must not change"):
        auxk(torch.ones(1, 3), torch.ones(1, 2, requires_grad=True), torch.tensor([True, False, False]), ROWS, False)


@pytest.mark.parametrize("every", [1, 4])
def test_all_that_can_die_before_the_next_look_are_named(every: int) -> None:
    dead, looks = DeadLatents(200), 0
    assert dead.may_die(60, 10, every) is None  # on a CPU the mask is looked at
    generator, last = torch.Generator().manual_seed(0), torch.zeros(0)
    with use_backend(TritonBackend()):
        for _ in range(40):
            may_die_d = dead.may_die(60, 10, every)
            assert may_die_d is not None
            looks += may_die_d is not last
            last = may_die_d
            assert set(dead.mask(60).nonzero().flatten().tolist()) <= set(may_die_d.tolist())
            assert len(may_die_d) % 64 == 0
            dead.update(torch.rand(200, generator=generator) < 0.3, 10)
    assert looks == 40 // every
    assert len(last) < 200


def test_candidates_are_filled_up_to_what_kernels_like() -> None:
    marked = torch.zeros(130, dtype=torch.bool)
    assert filled_up(marked).tolist() == []  # nobody can be dead: no AuxK
    marked[[1, 100]] = True
    assert filled_up(marked).tolist() == [*range(63), 100]  # 62 that live: 0 and 2 to 62
    marked[:] = True
    marked[7] = False
    assert filled_up(marked).tolist() == [*range(130)]  # more there are not
    assert filled_up(marked[:128]).tolist() == [*range(128)]
