"""bfloat16 for zarr-python, which has none: `bfloat16` on disk (the zarr-extensions name), uint16 bits in memory.

Importing this module registers the type. Other readers that know bfloat16 (tensorstore) read the same arrays as such,
and `torch.from_numpy(bits).view(torch.bfloat16)` costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray
from zarr.core.dtype import data_type_registry
from zarr.core.dtype.common import DataTypeValidationError
from zarr.core.dtype.npy.int import UInt16

NAME = "bfloat16"
_NAN = 0x7FC0


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Convert bfloat16 bit patterns to their exact values."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def from_float32(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Convert to bit patterns of the nearest bfloat16, ties to even; NaN becomes the quiet NaN."""
    wide = np.ascontiguousarray(x).view(np.uint32)
    # Half of the last place that is kept, less one, plus its own last bit: exact halves go to the even neighbour. A
    # carry out of the mantissa raises the exponent, which is the right result, up to infinity.
    rounded = (wide + (0x7FFF + ((wide >> 16) & 1)).astype(np.uint32)) >> 16
    # The addition would carry some NaNs over into other bit patterns, infinity among them.
    return np.where(np.isnan(x), np.uint16(_NAN), rounded.astype(np.uint16))


# zarr's own classes fix the name and the JSON of uint16 as literals; a type derived from them must say its own.
@dataclass(frozen=True, kw_only=True)
class BFloat16(UInt16):
    """The zarr v3 data type `bfloat16` whose native form is uint16 bits; never inferred from an array, always named."""

    _zarr_v3_name = NAME  # type: ignore[assignment]
    _zarr_v2_names = ()  # type: ignore[assignment]

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> BFloat16:
        raise DataTypeValidationError(f"{NAME} is never inferred from {dtype}: pass BFloat16()")

    def to_json(self, zarr_format: int) -> Any:
        if zarr_format != 3:
            raise ValueError(f"{NAME} is a type of zarr format 3, not {zarr_format}")
        return NAME

    def to_json_scalar(self, data: object, *, zarr_format: int) -> Any:
        bits = np.array([data], np.uint16)
        value = float(to_float32(bits)[0])
        # Zarr's JSON has words for NaN and infinities only; other NaNs are written as hex, so no bit is lost.
        if math.isnan(value):
            return "NaN" if bits[0] == _NAN else f"0x{int(bits[0]):04x}"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")

    def from_json_scalar(self, data: Any, *, zarr_format: int) -> np.uint16:
        if isinstance(data, str) and data.startswith("0x"):
            return np.uint16(int(data, 16))
        if not isinstance(data, str | SupportsFloat):
            raise TypeError(f"{data!r} is no {NAME} scalar")
        return np.uint16(from_float32(np.array([float(data)], np.float32))[0])


data_type_registry.register(NAME, BFloat16)
