"""What the kernel that made a gradient says of its rows, for the update that follows. Letters: F latents, D width.

A clip needs the norm of all gradients before the first weight moves. The kernel has each row in registers, so that a
pass over the gradient can be spared; but between kernel and update lies autograd, which knows nothing of such numbers.
They wait here, beside the gradient's memory, and go with it.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, UntypedStorage


class RowNorms(NamedTuple):
    """Of each row of a gradient."""

    squares_F: Tensor
    """Its squared norm; of a unit row that of what is left without the part along the row."""
    dots_F: Tensor | None
    """Its dot with the unit row; None where rows are free."""


_left: WeakKeyDictionary[UntypedStorage, tuple[int, RowNorms]] = WeakKeyDictionary()


def leave_norms(grad_FD: Tensor, norms: RowNorms) -> None:
    """Leave the norms of a gradient that has just been made."""
    _left[grad_FD.untyped_storage()] = (grad_FD._version, norms)


def take_norms(grad_FD: Tensor, *, unit: bool) -> RowNorms | None:
    """Take what was left of a gradient, with unit rows or free ones; None where anything was added to it since."""
    # torch counts the changes of a tensor in place, those of one that shares its memory too; a sum has other memory.
    version, norms = _left.pop(grad_FD.untyped_storage(), (-1, None))
    if norms is None or version != grad_FD._version or unit != (norms.dots_F is not None):
        return None
    return norms
