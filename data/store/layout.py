"""How rows lie in chunks and chunks in units: what a store asks for, and what the size of the run suggests."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from data.base.errors import UserError
from data.base.records import Json

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
ENCODINGS, CODECS = ("int8",), ("zstd", "blosc")
SCALE_BYTES = 4  # a float32 at the end of an int8 row: data/store/int8.py

# 6 MiB is 4,096 rows of GPT-2 small in bfloat16: smaller chunks mix better in the same memory, larger ones read faster.
_CHUNK_BYTES = 6 << 20
# Smaller files cost more to open than to read.
_CHUNK_ROWS_MIN = 128
# A harvester holds a whole unit of all its sites in memory before it is permuted and written, and another while it
# waits.
_HELD_BYTES = 10**9
# Rows are permuted within a unit only, so a store of few units would be read in nearly the text's order.
_UNITS_MIN = 32
_CHUNKS_PER_UNIT = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Layout:
    """How rows lie in chunks and chunks in units; part of the identity, what has its default left out.

    dtype: of the values, before any encoding. encoding: of activations, by `data.store.int8`. codec: compresses each
    chunk. shards: a unit is one file.
    """

    dtype: str  # "bfloat16" | "float16" | "float32"
    context: int  # T tokens of a context
    chunk_rows: int
    chunks_per_unit: int
    mixing_seed: int
    encoding: str | None = None  # "int8"
    codec: str | None = None  # "zstd" | "blosc"
    shards: bool = False

    def __post_init__(self) -> None:
        choices: dict[str, tuple[object, ...]] = {"dtype": tuple(ITEMSIZE), "shards": (False, True)}
        # Hydra hands over whatever YAML says: 1 equals True in Python, but `shards: 1` would make another identity.
        for name, known in {**choices, "encoding": (None, *ENCODINGS), "codec": (None, *CODECS)}.items():
            value = getattr(self, name)
            if not any(type(value) is type(choice) and value == choice for choice in known):  # 1 == True
                listed = ", ".join("null" if choice is None else str(choice).lower() for choice in known)
                raise UserError(f"store.{name} {value!r} is unknown: choose one of {listed}")
        for name in ("context", "chunk_rows", "chunks_per_unit"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        # Units are harvested one by one, by any process: a context cut between two would have to be run for both.
        if self.unit_rows % self.context:
            raise UserError(
                f"store.chunk_rows {self.chunk_rows} times store.chunks_per_unit {self.chunks_per_unit} must be "
                f"a multiple of packing.context {self.context}: a unit holds whole contexts"
            )

    @classmethod
    def from_json(cls, layout: Json) -> Layout:
        """Read a layout from a manifest, of an older version too.

        Those could round floats (`bitround`) as they were written; the rows that are stored are read as any others.
        """
        return cls(**{name: value for name, value in layout.items() if name != "bitround"})

    @property
    def unit_rows(self) -> int:
        return self.chunk_rows * self.chunks_per_unit

    @property
    def contexts_per_unit(self) -> int:
        return self.unit_rows // self.context

    @property
    def files_per_unit(self) -> int:
        return 1 if self.shards else self.chunks_per_unit

    @property
    def file_rows(self) -> int:
        return self.unit_rows // self.files_per_unit

    @property
    def json(self) -> Json:
        """Return the fields but those at their default,
        so that a store made before a field was thought of keeps its identity."""
        # This JSON is hashed into the store's fingerprint, and a new field must not move the stores that exist.
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not f.default}

    def row_bytes(self, width: int) -> int:
        """Return the bytes of a stored row of activations, before any codec."""
        return width + SCALE_BYTES if self.encoding == "int8" else width * ITEMSIZE[self.dtype]

    def chunks(self, rows: int) -> list[int]:
        """Return the valid rows of each chunk that `rows` rows from the beginning of one fill."""
        return [min(self.chunk_rows, rows - at) for at in range(0, rows, self.chunk_rows)]

    def files(self, rows: int) -> list[int]:
        """Return the valid rows of each file of a unit of `rows` rows."""
        return [min(self.file_rows, rows - at) for at in range(0, rows, self.file_rows)]


def _unit_target(rows: int, held_bytes: int, row_bytes: int) -> int:
    """Choose the largest unit that leaves 32 in `rows`,
    holds at most 1 GB over all sites and has at most 128 chunks."""
    held = _HELD_BYTES // held_bytes
    return min(rows // _UNITS_MIN, held, _CHUNKS_PER_UNIT[-1] * max(1, _CHUNK_BYTES // row_bytes))


def choose_layout(
    *,
    rows: int,
    d_model: int,
    n_sites: int,
    context: int,
    dtype: str,
    mixing_seed: int,
    chunk_rows: int | None,
    chunks_per_unit: int | None,
    **encoded: Any,
) -> Layout:
    """Fill what was not asked for (None) from the size of the run; `encoded` are the further fields of a Layout.

    Units are as large as mixing wants them: a 32nd of the store, 1 GB over all sites, 128 chunks of 6 MiB, whichever is
    least; then cut into the fewest chunks of at most 6 MiB, 8 to 128 of them, none below 128 rows.
    """
    sizes = {"rows": rows, "d_model": d_model, "the number of sites": n_sites, "packing.context": context}
    sizes |= {"store.chunk_rows": chunk_rows or 1, "store.chunks_per_unit": chunks_per_unit or 1}
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    row_bytes = Layout(dtype, 1, 1, 1, 0, **encoded).row_bytes(d_model)
    target = _unit_target(rows, d_model * ITEMSIZE[dtype] * n_sites, row_bytes)  # held as they come
    if chunks_per_unit is None and chunk_rows is not None:
        # A unit of n chunks holds whole contexts just where n * chunk_rows is a multiple of the context: n a multiple
        # of step.
        step = context // math.gcd(context, chunk_rows)
        wanted = min(max(target // chunk_rows, _CHUNKS_PER_UNIT[0]), _CHUNKS_PER_UNIT[-1])
        chunks_per_unit = max(1, wanted // step) * step
    elif chunks_per_unit is None:
        # The fewest chunks that keep each at 6 MiB or less: larger chunks read faster, and the unit, which mixes, stays
        # as it is.
        fits = (n for n in _CHUNKS_PER_UNIT if target * row_bytes <= n * _CHUNK_BYTES)
        chunks_per_unit = next(fits, _CHUNKS_PER_UNIT[-1])
    if chunk_rows is None:
        step = context // math.gcd(context, chunks_per_unit)
        # The same the other way round: now the number of chunks is fixed and the rows of one are rounded to fit.
        wanted = max(target // chunks_per_unit, _CHUNK_ROWS_MIN)
        chunk_rows = max(1, wanted // step) * step
    return Layout(dtype, context, chunk_rows, chunks_per_unit, mixing_seed, **encoded)
