"""Adam on a matrix in one pass: projection, clip, moments, step, unit rows. Letters: F latents, D model width.

Kingma and Ba 1412.6980; decoupled decay by Loshchilov and Hutter 1711.05101. The numbers are those of torch's Adam.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.sae.sparse.adam import WHOLE_ROW, AdamStep

MOST_WARPS = 16


@triton.jit
@no_type_check
def _clip_factor(total, clip):
    """Compute what the gradients are scaled by, as torch's clip_grad_norm_; NaN stays NaN."""
    factor = clip / (tl.sqrt(tl.load(total)) + 1e-6)
    return tl.where(factor > 1, 1.0, factor)


@triton.jit
@no_type_check
def _correction(steps, gain):
    """Compute 1 - decay^steps in float64: decays are near 1, where float32 has few digits of the difference."""
    return 1 - tl.exp(steps * tl.log(1 - tl.full([], gain, tl.float64)))


@triton.jit
@no_type_check
def adam_rows_kernel(
    grad_FD, weight_FD, mean_FD, square_FD, dots_F, total, step, rate, gain_1, gain_2, eps, decay, clip, D,
    UNIT: tl.constexpr, CLIP: tl.constexpr, DECOUPLED: tl.constexpr, RATE_HERE: tl.constexpr, WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Move one row. Of a decay 1 - decay is given as gain; the clip's norm is the root of `total`.

    With RATE_HERE the rate is read from the device.
    """
    row = tl.program_id(0).to(tl.int64)
    dtype = weight_FD.dtype.element_ty
    steps = tl.load(step).to(tl.float64)
    this_rate = tl.load(rate).to(tl.float32) if RATE_HERE else rate
    first_rate = (this_rate / _correction(steps, gain_1)).to(dtype)
    second_root = tl.sqrt(_correction(steps, gain_2)).to(dtype)
    factor = _clip_factor(total, clip).to(dtype) if CLIP else 1.0
    dot = tl.load(dots_F + row) if UNIT else 0.0
    length_2 = tl.zeros([], dtype=dtype)
    for first in range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        place, there = row * D + column, column < D
        grad = tl.load(grad_FD + place, mask=there, other=0.0)
        weight = tl.load(weight_FD + place, mask=there, other=0.0)
        if UNIT:
            grad -= dot * weight
        grad *= factor
        if DECOUPLED:
            weight -= this_rate * decay * weight
        else:
            grad += decay * weight
        mean = tl.load(mean_FD + place, mask=there, other=0.0)
        mean += gain_1 * (grad - mean)
        tl.store(mean_FD + place, mean, mask=there)
        square = tl.load(square_FD + place, mask=there, other=0.0)
        square += gain_2 * (grad * grad - square)
        tl.store(square_FD + place, square, mask=there)
        # Beyond the row's end eps may be 0 and the moments are: no 0 / 0 in the row's length.
        root = tl.where(there, tl.sqrt(square) / second_root + eps, 1.0)
        weight -= first_rate * mean / root
        if UNIT:
            length_2 += tl.sum(weight * weight, 0)
            if WHOLE:
                weight /= _length(length_2)
        tl.store(weight_FD + place, weight, mask=there)
    if UNIT and not WHOLE:
        tl.debug_barrier()  # what other threads of this program have written is read; it comes from the cache
        for first in range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            weight = tl.load(weight_FD + row * D + column, mask=column < D, other=0.0)
            tl.store(weight_FD + row * D + column, weight / _length(length_2), mask=column < D)


@triton.jit
@no_type_check
def _length(square):
    """Compute what a row is divided by; a row of zeros stays one, NaN stays NaN."""
    length = tl.sqrt(square)
    return tl.where(length < 1e-12, 1e-12, length)


def columns_of(width: int) -> int:
    """Choose how many entries of a row a program takes at a time."""
    return min(WHOLE_ROW, int(triton.next_power_of_2(width)))


def warps_of(columns: int) -> int:
    """Choose the warps of a program: 8 entries a thread of gradient, weight and both moments."""
    return max(1, min(MOST_WARPS, columns // 256))


def adam_rows_(
    grad_FD: Tensor,
    weight_FD: Tensor,
    mean_FD: Tensor,
    square_FD: Tensor,
    *,
    step: Tensor,
    settings: AdamStep,
    dots_F: Tensor | None,
    total: Tensor | None,
) -> None:
    """Move a matrix by one step of Adam, the `step`-th (1 for the first; a scalar on the device).

    With `dots_F`, those of the gradient with the unit rows, the gradient's part along each row goes first and the rows
    are brought to unit length afterwards. `total` is the squared norm of all gradients, which the clip needs.
    """
    tensors = (grad_FD, weight_FD, mean_FD, square_FD)
    assert all(tensor.is_contiguous() for tensor in tensors)
    width = weight_FD.shape[1]
    columns = columns_of(width)
    assert (settings.clip is None) == (total is None)
    with torch.cuda.device(weight_FD.get_device()):
        adam_rows_kernel[(len(weight_FD),)](
            *tensors,
            grad_FD if dots_F is None else dots_F,
            grad_FD if total is None else total,
            step,
            settings.rate,
            1 - settings.decay_1,
            1 - settings.decay_2,
            settings.eps,
            settings.weight_decay,
            settings.clip or 0.0,
            width,
            UNIT=dots_F is not None,
            CLIP=total is not None,
            DECOUPLED=settings.decoupled,
            RATE_HERE=isinstance(settings.rate, Tensor),
            WHOLE=columns >= width,
            COLUMNS=columns,
            num_warps=warps_of(columns),
        )
