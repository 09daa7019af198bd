"""The decoder's gradient without its part along each row. Letters: F latents, D model width."""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.sae.sparse.kernels.launch import warps_for_row


@triton.jit
@no_type_check
def project_rows_kernel(grad_FD, rows_FD, D, COLUMNS: tl.constexpr):
    """Project one row, whole."""
    column = tl.arange(0, COLUMNS)
    place = tl.program_id(0).to(tl.int64) * D + column
    grad = tl.load(grad_FD + place, mask=column < D, other=0.0)
    row = tl.load(rows_FD + place, mask=column < D, other=0.0)
    tl.store(grad_FD + place, grad - tl.sum(grad * row, 0) * row, mask=column < D)


def project_rows_(grad_FD: Tensor, rows_FD: Tensor) -> None:
    """Take from each row of grad its part along the (unit) row of `rows_FD`."""
    assert grad_FD.is_contiguous() and rows_FD.is_contiguous()
    width = rows_FD.shape[1]
    columns = int(triton.next_power_of_2(width))
    with torch.cuda.device(grad_FD.get_device()):
        project_rows_kernel[(len(grad_FD),)](grad_FD, rows_FD, width, COLUMNS=columns, num_warps=warps_for_row(columns))
