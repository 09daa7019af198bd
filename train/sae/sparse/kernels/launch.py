"""How large the programs are that walk over rows."""

from __future__ import annotations

import triton

ENTRIES = 16  # whose rows a program reads together, so that their loads overlap
_COLUMNS = 256  # entries of D that a program holds of each of several rows


def columns_of_rows(width: int) -> int:
    """Choose how many columns a program holds of each of several rows at a time."""
    return min(_COLUMNS, int(triton.next_power_of_2(width)))


def warps_for_row(columns: int) -> int:
    """Choose the warps of a program that holds two whole rows of so many columns in registers.

    With 4 warps a row of 16,384 columns takes more registers than a thread has, and spills to memory; 32 hold it.
    """
    return 4 if columns <= 4096 else 8 if columns <= 8192 else 32
