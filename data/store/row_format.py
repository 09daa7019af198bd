"""The rows of one array in their three forms: as they are given to be written, as they are stored, as they are read.

Only int8 rows, whose arithmetic is in `data.store.int8`, need torch: it is not imported for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from data.base.records import Json
from data.store.chunk_codec import ChunkCodec
from data.store.layout import SCALE_BYTES, Layout

if TYPE_CHECKING:
    from torch import Tensor

    from data.store.int8 import FeatureScale, RowDecoder

INDEX_ARRAYS: dict[str, tuple[int, ...]] = {"tokens": (), "origin": (2,)}  # what each row is, with the shape of theirs
_NATIVE = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class RowFormat:
    """The rows of a site in either split, or of a book. attributes: of its array, where that is made."""

    layout: Layout
    site: str
    attributes: Json

    @property
    def is_book(self) -> bool:
        return self.site in INDEX_ARRAYS

    @property
    def is_int8(self) -> bool:
        return self.layout.encoding == "int8" and not self.is_book

    @property
    def native(self) -> np.dtype[Any]:
        """Return the dtype of rows as they are given; uint16 are the bits of bfloat16."""
        # numpy has no bfloat16: its bits travel as uint16, which no arithmetic is ever done on.
        return np.dtype(np.int32 if self.is_book else _NATIVE[self.layout.dtype])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of rows as they are stored."""
        return np.dtype(np.int8) if self.is_int8 else self.native

    def shape(self, width: int) -> tuple[int, ...]:
        """Return the shape of a stored row of `width` numbers."""
        return INDEX_ARRAYS.get(self.site, (width + SCALE_BYTES if self.is_int8 else width,))

    def width(self, shape: tuple[int, ...]) -> int:
        """Return how many numbers a row stored in this shape has."""
        return int(np.prod(shape)) - (SCALE_BYTES if self.is_int8 else 0)

    def format(self, shape: tuple[int, ...]) -> ChunkCodec:
        """Return how files of rows of this shape are made."""
        return ChunkCodec(self.layout, self.dtype, shape)

    @cached_property
    def standard(self) -> FeatureScale | None:
        """Return what int8 rows are encoded by; None where no array says it yet."""
        from data.store.int8 import FeatureScale

        return FeatureScale.from_attributes(self.attributes["encoding"]) if "encoding" in self.attributes else None

    def decoder(self, width: int) -> RowDecoder:
        """Return a new module that turns stored rows, as tensors, into activations."""
        from data.store.int8 import RowDecoder

        if self.is_int8 and self.standard is None:
            raise UserError(
                f"the arrays of site {self.site} do not say how their rows are encoded: delete the store and harvest "
                "again"
            )
        return RowDecoder(width, self.standard if self.is_int8 else None)

    def values(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Decode stored rows to the floats that readers get of them."""
        if self.is_int8:
            decoded: NDArray[Any] = self.decoder(self.width(stored.shape[1:]))(_tensor(stored)).numpy()
            return decoded
        return _widen(stored)

    def stored(self, given: NDArray[Any]) -> NDArray[Any]:
        """Encode given rows as they are stored."""
        if self.is_int8:
            from data.store.int8 import encode_int8

            assert self.standard is not None, f"no standard for {self.site}"
            encoded: NDArray[Any] = encode_int8(_tensor(_widen(given)), self.standard).numpy()
            return encoded
        # Floats are stored as they are given; a copy here would double the memory of a chunk for nothing.
        return given

    def zarr_files(self, split: str, shape: tuple[int, ...]) -> dict[str, bytes]:
        """Return {key: content} of what zarr describes a new array and its groups with."""
        import zarr
        from zarr.storage import MemoryStore

        from data.store.zarr_bfloat16 import BFloat16

        # A store in memory: zarr writes its JSON there, and the caller decides how it gets to the disk.
        files: dict[str, Any] = {}
        zarr.open_group(MemoryStore(files), mode="a").require_group(split).create_array(
            self.site,
            shape=shape,
            chunks=(self.layout.chunk_rows, *shape[1:]),
            shards=(self.layout.unit_rows, *shape[1:]) if self.layout.shards else None,
            dtype=BFloat16() if self.dtype == np.uint16 else self.dtype,
            fill_value=0,
            compressors=self.format(shape[1:]).compressor,
            filters=None,
            # All chunks in one folder: one directory fsync a unit.
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        return {key: file.to_bytes() for key, file in files.items()}


def _tensor(array: NDArray[Any]) -> Tensor:
    """Make a tensor of an array; copied where it may not be written to, which torch does not take."""
    import torch

    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _widen(rows: NDArray[Any]) -> NDArray[Any]:
    """Convert native rows to floats."""
    if rows.dtype != np.uint16:
        return rows
    from data.store.zarr_bfloat16 import to_float32

    return to_float32(rows)
