"""What this machine's CPU can do by itself."""

from __future__ import annotations

from functools import cache


@cache
def has_bf16_units() -> bool:
    """Say whether this CPU multiplies bfloat16 by itself, with AMX or AVX512-BF16."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
