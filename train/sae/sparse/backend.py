"""The seam between the maths of a sparse step and the machine that computes it.

The CPU's backend finds selections of any size; Triton's makes their sizes known beforehand, so that the host need not
wait for the GPU, but for what lies above a bound. Both give the same numbers to rounding: the contract test holds each
to the dense form.
Letters: B tokens in a batch, D model width, F latents, n entries, G groups of entries, X rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from train.sae.sparse.adam import AdamStep
from train.sae.sparse.cpu import CPUBackend
from train.sae.sparse.groups import Groups
from train.sae.sparse.product import Product
from train.sae.sparse.row_norms import RowNorms
from train.sae.sparse.rules import Entries, Selection
from train.sae.sparse.triton import TritonBackend


@runtime_checkable
class Backend(Protocol):
    """What a sparse step needs of a machine."""

    @property
    def fixed_sizes(self) -> bool:
        """Return whether a choice of the largest always has the size asked for, what is not positive included."""

    @property
    def dense_dead(self) -> int:
        """Return how many dead latents, in multiples of k_aux,
        up to which AuxK takes all of their z rather than a selection."""

    def select(self, product: Product, selections: Sequence[Selection]) -> list[Entries | Tensor]:
        """Execute the selections on z; the whole z [B, d] where everything, or nearly so, is kept."""

    def top_of_rows(self, entries: Entries, k: int, rows: int) -> Int[Tensor, " m"]:
        """Find which entries are among the k largest of their row."""

    def mark_largest(self, z_BM: Float[Tensor, "B M"], k: int) -> Shaped[Tensor, "B M"]:
        """Mark the k largest of each row by 1 or True, ties to the lowest index."""

    def ends(self, index_n: Int[Tensor, " n"], groups: int) -> Int[Tensor, " ends"]:
        """Find where each group of an ascending index begins, and where the last one ends: [G + 1]."""

    def order(self, index_n: Int[Tensor, " n"], groups: int) -> Groups:
        """Sort an index stably into groups."""

    def gather_sums(
        self,
        weight_n: Float[Tensor, " n"],
        index_n: Int[Tensor, " n"],
        ends: Int[Tensor, " ends"],
        table_XD: Float[Tensor, "X D"],
    ) -> Float[Tensor, "G D"]:
        """Sum weight * table[index] over each group of entries."""

    def group_sums(
        self, weight_n: Float[Tensor, " n"], index_n: Int[Tensor, " n"], groups: Groups, table_XD: Float[Tensor, "X D"]
    ) -> Float[Tensor, "G D"]:
        """Sum weight * table[index] over each of the groups."""

    def group_sums_and_totals(
        self, weight_n: Float[Tensor, " n"], index_n: Int[Tensor, " n"], groups: Groups, table_XD: Float[Tensor, "X D"]
    ) -> tuple[Float[Tensor, "G D"], Float[Tensor, " G"]]:
        """Sum weight * table[index], and weight, over each of the groups."""

    def totals(self, values_n: Float[Tensor, " n"], groups: Groups) -> Float[Tensor, " G"]:
        """Sum the values of each group."""

    def dots(
        self,
        rows_n: Int[Tensor, " n"],
        latents_n: Int[Tensor, " n"],
        left_XD: Float[Tensor, "X D"],
        right_FD: Float[Tensor, "F D"],
    ) -> Float[Tensor, " n"]:
        """Compute left[row] . right[latent] of each entry."""

    def project_rows_(self, grad_FD: Float[Tensor, "F D"], rows_FD: Float[Tensor, "F D"]) -> None:
        """Take from each row of grad its part along the (unit) row of `rows_FD`."""

    def fired(self, values_n: Tensor, latents_n: Tensor, width: int) -> Bool[Tensor, " F"]:
        """Find the latents with a value above zero."""

    @property
    def fused(self) -> FusedKernels | None:
        """Return what does several operations of a step in one pass, where there is any."""


@runtime_checkable
class FusedKernels(Protocol):
    """Several operations of a step in one pass over what they read."""

    def decode_error(
        self,
        values_n: Float[Tensor, " n"],
        latents_n: Int[Tensor, " n"],
        ends: Int[Tensor, " ends"],
        W_dec_FD: Float[Tensor, "F D"],
        base: Tensor,
        target_BD: Float[Tensor, "B D"],
        prefixes: int = 1,
        *,
        through_zeros: bool = False,
    ) -> tuple[Float[Tensor, "X D"], Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " n"]]:
        """Compute e_p = f W_dec + base - target by the entries of each prefix, which `ends` bounds.

        Gives the sums of e_p and all later ones, the tokens' squared norms over prefixes and of the last one, and the
        entries' dots with the sum of their first prefix, of those that are not 0,
        or with `through_zeros` of all.
        """

    def gradient_rows(
        self,
        weight_n: Float[Tensor, " n"],
        index_n: Int[Tensor, " n"],
        groups: Groups,
        table_XD: Float[Tensor, "X D"],
        unit_FD: Float[Tensor, "F D"] | None,
    ) -> tuple[Float[Tensor, "F D"], Float[Tensor, " F"], RowNorms]:
        """Sum weight * table[index], and weight, over each of the groups, and say of the rows what `row_norms` does."""

    def row_norms(
        self, grad_FD: Float[Tensor, "F D"], rows_FD: Float[Tensor, "F D"] | None
    ) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
        """Compute the dot of each row of grad with its unit row, and the squared norm of what is left without it."""

    def adam_rows_(
        self,
        grad_FD: Float[Tensor, "F D"],
        weight_FD: Float[Tensor, "F D"],
        mean_FD: Float[Tensor, "F D"],
        square_FD: Float[Tensor, "F D"],
        *,
        step: Tensor,
        settings: AdamStep,
        dots_F: Float[Tensor, " F"] | None,
        total: Float[Tensor, ""] | None,
    ) -> None:
        """Move a matrix by one step of Adam; with `dots_F` its rows are unit before and after."""


_CPU = CPUBackend()
_ELSEWHERE = CPUBackend(block_entries=1 << 27)  # torch's own operations on another device, such as Apple's
_TRITON = TritonBackend()
_chosen: ContextVar[Backend | None] = ContextVar("backend", default=None)


def backend_for(x: Tensor) -> Backend:
    """Choose the backend by the device of x, or the one that `use_backend` names."""
    # A context variable and no argument: a test chooses once, and the maths in between does not carry it along.
    if (chosen := _chosen.get()) is not None:
        return chosen
    if x.is_cuda:
        return _TRITON
    return _CPU if x.device.type == "cpu" else _ELSEWHERE


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Compute with `backend` whatever the device, for a while: for tests, as of Triton in its interpreter."""
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)
