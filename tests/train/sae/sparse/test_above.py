"""What lies above a bound on a GPU: exact whatever program comes first, in blocks, with one number read of the device.

The kernel itself runs on a GPU where there is one, else in Triton's interpreter, and is slow there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.toy import activations, make
from train.sae import SAE
from train.sae.sparse.above import PIECE_LATENTS, Block, Packed, blocks_of, select_above
from train.sae.sparse.backend import use_backend
from train.sae.sparse.cpu import CPUBackend, select
from train.sae.sparse.product import Product
from train.sae.sparse.rules import Above, Entries, Selection
from train.sae.sparse.triton import TritonBackend

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield


@dataclass(frozen=True)
class Shuffled(TritonBackend):
    """Packs by torch's operations, the pieces of rows in an order of its own, as a GPU's programs come."""

    seed: int = 0

    def pack_above(self, z_Bc: Tensor, bound: Tensor, block: Block, packed: Packed) -> None:
        pieces = block.pieces
        order = torch.randperm(len(z_Bc) * pieces, generator=torch.Generator().manual_seed(self.seed))
        for row, piece in ((int(cell) // pieces, int(cell) % pieces) for cell in order):
            first, cell = piece * PIECE_LATENTS, block.first_piece + piece
            part = z_Bc[row, first : first + PIECE_LATENTS]
            least = bound if not bound.dim() else bound[block.first + first :][: len(part)]
            place = (part > least).nonzero()[:, 0]
            start = int(packed.found)
            packed.starts_BP[row, cell], packed.counts_BP[row, cell] = start, len(place)
            packed.found.add_(len(place))
            if start + len(place) <= len(packed.values_s):
                packed.values_s[start : start + len(place)] = part[place]
                packed.latents_s[start : start + len(place)] = (block.first + first + place).int()


class Given(Product):
    """Not multiplied: z is the weights, which may be NaN without spreading it."""

    def block(self, first: int, last: int, out: Tensor | None = None) -> Tensor:
        z_Bc = self.W_enc_FD[first:last].t()
        return z_Bc.contiguous() if out is None else out.copy_(z_Bc)


def product_of(z_BF: Tensor) -> Product:
    return Given(z_BF.new_zeros(len(z_BF), len(z_BF)), z_BF.t(), None)


def drawn(rows: int, width: int, seed: int, values: str = "normal") -> tuple[Tensor, Tensor]:
    """z and a bound for each latent: many z equal their bound, a row has none above, another has all."""
    generator = torch.Generator().manual_seed(seed)
    z_BF = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    bound_F = torch.randint(0, 3, (width,), generator=generator).double()
    if values == "ties":
        z_BF = z_BF.round()
    z_BF[rows // 2] = -3.0
    z_BF[-1] = 5.0
    return z_BF.to(DEVICE), bound_F.to(DEVICE)


def hold_equal(found: Entries | Tensor, wanted: Entries) -> None:
    assert isinstance(found, Entries)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def above(backend: TritonBackend, z_BF: Tensor, bound: Tensor) -> Entries | Tensor:
    (found,) = backend.select(product_of(z_BF), [Selection(Above(bound))])
    return found


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 300),
    cut=st.integers(1, 300),
    seed=st.integers(0, 99),
    values=st.sampled_from(["normal", "ties"]),
)
@settings(max_examples=100, deadline=None)
def test_the_entries_are_the_cpus_in_whatever_order_they_were_packed(
    rows: int, width: int, cut: int, seed: int, values: str
) -> None:
    z_BF, bound_F = (part.cpu() for part in drawn(rows, width, seed, values))
    backend = Shuffled(block_entries=rows * cut, dense_share=1.0, seed=seed)
    for bound in (bound_F, bound_F[0]):
        hold_equal(above(backend, z_BF, bound), select(Above(bound), z_BF))


def test_pieces_by_hand() -> None:
    """Blocks of 5,000, 5,000 and 2,000 latents: 3, 3 and 1 pieces of up to 2,048."""
    blocks = blocks_of(range(0, 12_000, 5000), 12_000)
    assert blocks == [Block(0, 5000, 0), Block(5000, 10_000, 3), Block(10_000, 12_000, 6)]
    assert [block.pieces for block in blocks] == [3, 3, 1]


def test_the_order_by_hand() -> None:
    """Two rows of two pieces; the last piece was packed first, and the second row's first has none."""
    packed = Packed(
        latents_s=torch.tensor([4, 6, 1, 3, 5], dtype=torch.int32),
        values_s=torch.tensor([40.0, 60.0, 10.0, 30.0, 50.0]),
        found=torch.tensor(5),
        starts_BP=torch.tensor([[2, 4], [77, 0]]),
        counts_BP=torch.tensor([[2, 1], [0, 2]]),
    )
    rows_n, latents_n, values_n = packed.in_order(5)
    assert rows_n.tolist() == [0, 0, 0, 1, 1]
    assert latents_n.tolist() == [1, 3, 5, 4, 6]
    assert values_n.tolist() == [10, 30, 50, 40, 60]


@pytest.mark.parametrize("cut", [32, 64, 200])
def test_all_of_z_comes_where_more_than_the_share_is_above(cut: int) -> None:
    """96 latents, 2 tokens, 48 entries are a fourth: 48 above come sparse, 49 dense, in one block or three."""
    z_BF = torch.full((2, 96), -1.0)
    z_BF.view(-1)[torch.randperm(192, generator=torch.Generator().manual_seed(0))[:48]] = 1.0
    backend = Shuffled(block_entries=2 * cut, dense_share=0.25)
    hold_equal(above(backend, z_BF, torch.tensor(0.0)), select(Above(torch.tensor(0.0)), z_BF))
    z_BF[0, int((z_BF[0] < 0).nonzero()[0])] = 2.0
    assert torch.equal(above(backend, z_BF, torch.tensor(0.0)), z_BF)  # type: ignore[arg-type]


def test_one_number_is_read_of_the_device() -> None:
    read: list[int] = []

    def reading(number: Tensor) -> int:
        read.append(int(number))
        return read[-1]

    z_BF, bound_F = (part.cpu() for part in drawn(4, 200, 0))
    for share in (1.0, 0.0):
        pack: Callable[[Tensor, Tensor, Block, Packed], None] = Shuffled().pack_above
        select_above(product_of(z_BF), bound_F, block_entries=4 * 64, dense_share=share, pack=pack, read=reading)
    assert read == [int((z_BF > bound_F).sum())] * 2


def test_nan_is_no_entry() -> None:
    z_BF, bound_F = (part.cpu() for part in drawn(5, 70, 3))
    z_BF[1, ::2], bound_F[::3] = torch.nan, torch.nan
    found = above(Shuffled(dense_share=1.0), z_BF, bound_F)
    hold_equal(found, select(Above(bound_F), z_BF))
    assert isinstance(found, Entries) and not bool(found.values_n.isnan().any())


# The kernel


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 31), (5, 2048), (4, 2049), (3, 5001)])
@pytest.mark.parametrize("values", ["normal", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_packs_what_a_mask_finds(rows: int, width: int, values: str, dtype: torch.dtype) -> None:
    z_BF, bound_F = (part.to(dtype) for part in drawn(rows, width, width, values))
    z_BF[0, 5::7] = torch.nan
    for entries in (1 << 24, rows * 1000):
        backend = TritonBackend(block_entries=entries, dense_share=1.0)
        for bound in (bound_F, bound_F[0], torch.tensor(9.0, dtype=dtype, device=DEVICE)):
            hold_equal(above(backend, z_BF, bound), select(Above(bound), z_BF))


# The steps of what lies above a bound


def stepped(sae: SAE, x_BD: Tensor) -> tuple[list[Tensor], bool]:
    """Loss and gradients, and whether z came whole."""
    sae.zero_grad()
    step = sae.loss(sae.norm.normalise(x_BD))
    step.loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in sae.parameters()]
    return [step.loss.detach(), step.fired_F, step.metrics["l0"], *grads], step.codes.support is None


def hold_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype))


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("form", ["relu", "relu bricken", "gated", "jumprelu", "jumprelu target"])
@pytest.mark.parametrize("entries", [1 << 24, 6 * 32], ids=["one block", "two blocks"])
def test_a_step_is_the_cpus_whether_z_comes_whole_or_not(form: str, entries: int) -> None:
    """Float64, with latents active on all tokens, on none, and everything in between; a switch to all of z and back."""
    with use_backend(CPUBackend()):
        sae, x = make(form).double().to(DEVICE), activations(6).double().to(DEVICE)
    bias = "b_gate" if form == "gated" else "b_enc"
    came_whole = []
    for lowered in (2.0, -2.0, 2.0):
        with torch.no_grad():
            biases_F = sae.get_parameter(bias)
            start_F = biases_F.clone()
            biases_F -= lowered
            biases_F[::7] -= 50.0  # never active
            biases_F[3] += 50.0  # always
        with use_backend(TritonBackend(block_entries=entries, dense_share=0.25)):
            found, whole = stepped(sae, x)
        with use_backend(CPUBackend(dense_share=1.0)):
            wanted, _ = stepped(sae, x)
        came_whole.append(whole)
        hold_close(found, wanted)
        with torch.no_grad():
            biases_F.copy_(start_F)
    assert came_whole == [False, True, False]


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("form", ["relu", "gated", "jumprelu"])
def test_a_step_of_no_entry_is_the_cpus(form: str) -> None:
    with use_backend(CPUBackend()):
        sae, x = make(form).double().to(DEVICE), activations(6).double().to(DEVICE)
    with torch.no_grad():
        sae.get_parameter("b_gate" if form == "gated" else "b_enc").sub_(1000.0)
    with use_backend(TritonBackend()):
        found, whole = stepped(sae, x)
        f = sae.encode(x)
    with use_backend(CPUBackend()):
        wanted, _ = stepped(sae, x)
    assert not whole and not bool(f.any())
    hold_close(found, wanted)


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_nan_among_the_weights_is_what_it_is_on_a_cpu() -> None:
    """No entry, and so no part of a loss; a NaN of the batch is in the loss."""
    with use_backend(CPUBackend()):
        sae, x = make("jumprelu").to(DEVICE), activations(6).to(DEVICE)
    with torch.no_grad():
        sae.W_enc_FD[5] = torch.nan
    for _ in range(2):
        with use_backend(TritonBackend(dense_share=1.0)):
            found, _ = stepped(sae, x)
        with use_backend(CPUBackend(dense_share=1.0)):
            wanted, _ = stepped(sae, x)
        assert torch.equal(found[0].isnan(), wanted[0].isnan())
        x[0, 0] = torch.nan
    assert bool(found[0].isnan())
