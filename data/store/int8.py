"""How rows of activations become the int8 rows that are stored, and back: about half the bytes of bfloat16.

An int8 row is D numbers q_d in -127..127 and, in the four bytes after them, the row's scale s, a little-endian float32:

    x_d = (q_d s) std_d + mean_d        q = round(z / s),  s = max_d |z_d| / 127,  z = (x - mean) / std

mean and std are of each dimension of the site over the first rows of train/ (the pilot), float32, and lie with this
formula in the attributes of the site's arrays, so that any reader of Zarr can decode them. Dividing by std keeps a
dimension of large values from taking all of a row's range. It is one array, so that a chunk stays one file, one read
and one permutation. Letters: N rows, B rows of a batch, D width, S = D + 4 bytes of a stored row.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Real
from torch import Tensor, nn

from data.base.records import Json
from data.store.layout import SCALE_BYTES

PILOT_ROWS = 8192  # the standard only shares out the rounding error, it biases no value
_LARGEST = 127
_LEAST_STD = 1e-3  # of the root mean square over dimensions; those below add less than 1e-6 of the error
_FORMULA = (
    "q = row[:-4]; s = row[-4:] as the bytes of one little-endian float32; x = (q * s) * std + mean, all in float32"
)


@dataclass(frozen=True)
class FeatureScale:
    """Mean and standard deviation of each dimension of a site."""

    mean: Float32[np.ndarray, " D"]
    std: Float32[np.ndarray, " D"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "N D"]) -> FeatureScale:
        """Measure the scale on the pilot's rows, those not finite left out:
        they are refused where they are to be stored.

        In numpy, whose sums do not depend on a number of threads.
        """
        wide = x[np.isfinite(x).all(1)].astype(np.float64)
        if not len(wide):
            wide = np.zeros((1, x.shape[1]))
        std = wide.std(0)
        # A dimension that is constant on the pilot would divide by zero, and one that is nearly so would turn its noise
        # into the row's largest |z|, which sets the scale of all others. If all are constant any floor will do: 1.
        floor = _LEAST_STD * float(np.sqrt(np.mean(std**2))) or 1.0
        return cls(wide.mean(0).astype(np.float32), np.maximum(std, floor).astype(np.float32))

    def attributes(self, site: str) -> Json:
        """Return what the arrays' attributes say under `encoding`;
        float32 and JSON's shortest decimals map one to one."""
        numbers = {"mean": self.mean.tolist(), "std": self.std.tolist()}
        return {"name": "int8", "site": site, "formula": _FORMULA, **numbers}

    @classmethod
    def from_attributes(cls, attributes: Json) -> FeatureScale:
        return cls(np.array(attributes["mean"], np.float32), np.array(attributes["std"], np.float32))


def encode_int8(x_ND: Float[Tensor, "N D"], standard: FeatureScale) -> Int8[Tensor, "N S"]:
    """Encode rows as int8 on the device of `x_ND`; a value that is not finite decodes to one that is not."""
    assert sys.byteorder == "little", "int8 rows are written on little-endian machines"
    mean_D, std_D = (torch.from_numpy(part).to(x_ND.device) for part in (standard.mean, standard.std))
    # In float32 as the decoder has it: the error that is left is then the rounding to 255 levels and nothing of the
    # arithmetic.
    z_ND = (x_ND.float() - mean_D) / std_D
    # -128 is never used: a symmetric range keeps the formula free of an offset. A NaN or an infinity ends up in the
    # scale, so the whole row decodes to no finite number and the writer refuses it.
    scale_N1 = z_ND.abs().amax(1, keepdim=True) / _LARGEST
    # A row that equals the mean has scale 0; it is divided by 1 and stored as zeros, which decode to the mean.
    q_ND = (z_ND / torch.where(scale_N1 == 0, 1.0, scale_N1)).round().clamp(-_LARGEST, _LARGEST)
    # The scale travels as the last four bytes of its own row, so a permutation of rows cannot part them.
    return torch.cat([q_ND.to(torch.int8), scale_N1.view(torch.int8)], 1)


class RowDecoder(nn.Module):
    """Stored rows [B, S] to activations [B, D] on whatever device they are; rows of floats stay what they are.

    Each operation of the formula is rounded on its own, so that every device gives the same float32 bits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, standard: FeatureScale | None = None) -> None:
        super().__init__()
        self.width, self.encoded = width, standard is not None
        if standard is not None:
            for name, value in (("mean", standard.mean), ("std", standard.std)):
                # Not persistent: the decoder belongs to the store, and an SAE's state must not depend on how its rows
                # were stored.
                self.register_buffer(name, torch.from_numpy(value), persistent=False)

    def forward(self, rows: Real[Tensor, "B S"]) -> Real[Tensor, "B D"]:
        if not self.encoded:
            return rows
        assert sys.byteorder == "little" and rows.shape[1] == self.width + SCALE_BYTES, rows.shape
        # A copy, also where they lie together: a view as float32 must begin at a multiple of four bytes.
        scale = rows[:, self.width :].clone(memory_format=torch.contiguous_format).view(torch.float32)
        return (rows[:, : self.width] * scale) * self.std + self.mean
