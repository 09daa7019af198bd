"""How large the programs are that walk over rows."""

from __future__ import annotations

import triton

ENTRIES = 16  # whose rows a program reads together, so that their loads overlap
_TILE_ENTRIES = 8192  # of whole rows that a program reads together
_COLUMNS = 256  # entries of D that a program holds of each of several rows


def columns_of_rows(width: int) -> int:
    """Choose how many columns a program holds of each of several rows at a time."""
    return min(_COLUMNS, int(triton.next_power_of_2(width)))


def warps_for_row(columns: int) -> int:
    """Choose the warps of a program that holds two whole rows of so many columns in registers.

    With 4 warps a row of 16,384 columns takes more registers than a thread has, and spills to memory; 32 hold it.
    """
    return 4 if columns <= 4096 else 8 if columns <= 8192 else 32


def tile_of_rows(columns: int) -> int:
    """Choose how many whole rows of so many columns a program reads together."""
    return max(1, min(ENTRIES, _TILE_ENTRIES // columns))


def warps_of_tile(entries: int) -> int:
    """Choose the warps of a program that reads so many entries together: 32 a thread at most, up to 32 warps."""
    return max(4, min(32, entries // 1024))
