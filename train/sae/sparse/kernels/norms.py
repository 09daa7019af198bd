"""What a clip needs to know of a matrix's gradient, in one pass over it. Letters: F latents, D model width."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.sae.sparse.kernels.launch import warps_for_row


@triton.jit
@no_type_check
def row_norms_kernel(grad_FD, rows_FD, dots_F, squares_F, D, UNIT: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum the squares of one row, of a unit row those of the gradient without its part along the row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    grad = tl.load(grad_FD + row * D + column, mask=column < D, other=0.0)
    if UNIT:
        along = tl.load(rows_FD + row * D + column, mask=column < D, other=0.0)
        dot = tl.sum(grad * along, 0)
        tl.store(dots_F + row, dot)
        # From the difference itself: the difference of two squares would lose what is small beside the part that goes.
        grad -= dot * along
    tl.store(squares_F + row, tl.sum(grad * grad, 0))


def row_norms(grad_FD: Tensor, rows_FD: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute of each row of the gradient its dot with the unit row of `rows_FD`, and the squared norm of what is left.

    Without `rows_FD` nothing is taken off, and the dots are not set.
    """
    assert grad_FD.is_contiguous() and (rows_FD is None or rows_FD.is_contiguous())
    dots_F, squares_F = grad_FD.new_empty(len(grad_FD)), grad_FD.new_empty(len(grad_FD))
    width = grad_FD.shape[1]
    columns = int(triton.next_power_of_2(width))
    with torch.cuda.device(grad_FD.get_device()):
        row_norms_kernel[(len(grad_FD),)](
            grad_FD,
            grad_FD if rows_FD is None else rows_FD,
            dots_F,
            squares_F,
            width,
            UNIT=rows_FD is not None,
            COLUMNS=columns,
            num_warps=warps_for_row(columns),
        )
    return dots_F, squares_F
