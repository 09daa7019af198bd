"""The bytes of a chunk file, as zarr itself would write them: a chunk, compressed or not, or a shard of several.

A shard is its chunks one after another and then, as zarr's `sharding_indexed` has it, an index of (offset, bytes) for
each, all ones for a chunk that is not there, with its own crc32c.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.records import Json
from data.store.layout import Layout

# Level 1 of zstd takes bfloat16 activations as far as level 9, at ten times its speed; of blosc's, lz4 over bit planes
# is the fastest both ways and no larger than zstd: benchmarks/encoding.py.
_ZSTD = {"level": 1, "checksum": False}
_BLOSC = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0}
_INDEX_CODECS: list[Json] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
# The value that zarr's sharding specification gives a chunk that is not stored.
_ABSENT = 2**64 - 1
_INDEX_ENTRY_BYTES, _CRC_BYTES = 16, 4  # of a shard's index: an offset and a length a chunk, then its crc32c


@dataclass(frozen=True)
class ChunkCodec:
    """How the files of one array are made. dtype, row_shape: of stored rows."""

    layout: Layout
    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.row_shape))

    @property
    def chunk_bytes(self) -> int:
        """Return the bytes of a chunk without its codec."""
        return self.layout.chunk_rows * self.row_bytes

    def file_bytes(self, rows: int) -> int | None:
        """Return the length of a file of so many valid rows; None where only a compressor knows it."""
        if self.layout.codec is not None:
            return None
        chunks = len(self.layout.chunks(rows)) * self.chunk_bytes
        index = _INDEX_ENTRY_BYTES * self.layout.chunks_per_unit + _CRC_BYTES if self.layout.shards else 0
        return chunks + index

    def metadata(self) -> Json:
        """Return `chunk_grid` and `codecs` of the array's zarr.json."""
        codecs: list[Json] = [{"name": "bytes"}]
        # zarr-python leaves `endian` out for single bytes, and `open_reader` compares with what zarr wrote.
        if self.dtype.itemsize > 1:
            codecs[0]["configuration"] = {"endian": "little"}
        if self.compressor is not None:
            codecs.append(self.compressor)
        if self.layout.shards:
            inner = {"chunk_shape": [self.layout.chunk_rows, *self.row_shape], "codecs": codecs}
            outer = {"index_codecs": _INDEX_CODECS, "index_location": "end"}
            codecs = [{"name": "sharding_indexed", "configuration": inner | outer}]
        grid = {"chunk_shape": [self.layout.file_rows, *self.row_shape]}
        return {"chunk_grid": {"name": "regular", "configuration": grid}, "codecs": codecs}

    @property
    def compressor(self) -> Json | None:
        """Return the compressor as zarr names it."""
        if self.layout.codec is None:
            return None
        settings = _ZSTD if self.layout.codec == "zstd" else {"typesize": self.dtype.itemsize} | _BLOSC
        return {"name": self.layout.codec, "configuration": settings}

    def encode(self, chunks: Iterable[NDArray[Any]]) -> Iterator[bytes]:
        """Yield the bytes of a file, one piece after another. chunks: the valid rows of each chunk."""
        index, at = np.full((self.layout.chunks_per_unit, 2), _ABSENT, "<u8"), 0
        for number, rows in enumerate(chunks):
            data = rows.astype(self.dtype.newbyteorder("<"), copy=False).tobytes()
            # The last chunk is padded with zeros to full size: Zarr's regular grid has no short chunk, and other
            # readers expect it so.
            data = self._compress(data + bytes(self.chunk_bytes - len(data)))
            index[number] = at, len(data)
            at += len(data)
            yield data
        if self.layout.shards:
            # After the chunks ("index_location": "end"), since their offsets are known only once they have been
            # compressed.
            yield _sealed(index)

    def decode(self, content: bytes, valid: Iterable[int]) -> Iterator[NDArray[Any]]:
        """Yield the valid rows of each chunk of a file; a ValueError where its bytes are not what `encode` gives."""
        parts = self._parts(content) if self.layout.shards else [memoryview(content)]
        for part, n in zip(parts, valid, strict=True):
            data = self._expand(part)
            if len(data) != self.chunk_bytes:
                raise ValueError(f"a chunk has {len(data)} bytes where its array wants {self.chunk_bytes}")
            yield np.frombuffer(data, self.dtype.newbyteorder("<")).reshape(-1, *self.row_shape)[:n]

    def _parts(self, content: bytes) -> list[memoryview]:
        """Cut out the chunks that are in a shard, which must lie in it from its beginning on without a gap."""
        end = len(content) - _INDEX_ENTRY_BYTES * self.layout.chunks_per_unit - _CRC_BYTES
        index = np.frombuffer(content[max(end, 0) : -_CRC_BYTES], "<u8").reshape(-1, 2)
        # The index has a checksum of its own, so a damaged one is told apart from a damaged chunk.
        if end < 0 or _sealed(index) != content[end:]:
            raise ValueError("its index of chunks is damaged")
        there = index[index[:, 0] != _ABSENT].astype(np.int64)
        stops = np.cumsum(there[:, 1])
        if (
            (index[len(there) :] != _ABSENT).any()
            or (stops - there[:, 1] != there[:, 0]).any()
            or stops[-1:].sum() != end
        ):
            raise ValueError("its index of chunks has gaps")
        return [memoryview(content)[start : start + length] for start, length in there]

    def _compress(self, data: bytes) -> bytes:
        if self.layout.codec is None:
            return data
        return bytes(self._numcodec().encode(data))

    def _expand(self, data: memoryview) -> bytes | memoryview:
        if self.layout.codec is None:
            return data
        try:
            return bytes(self._numcodec().decode(data))
        except RuntimeError as error:
            raise ValueError(f"a chunk cannot be expanded: {error}") from None

    def _numcodec(self) -> Any:
        from numcodecs import blosc, zstd

        if self.layout.codec == "zstd":
            return zstd.Zstd(**_ZSTD)
        # Its threads put blocks into a chunk in the order in which they are done: other bytes in each run.
        blosc.use_threads = False
        return blosc.Blosc(**(_BLOSC | {"typesize": self.dtype.itemsize, "shuffle": blosc.BITSHUFFLE}))


def _sealed(index: NDArray[np.uint64]) -> bytes:
    """Return the bytes of a shard's index and their crc32c."""
    import google_crc32c

    data = index.tobytes()
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")
