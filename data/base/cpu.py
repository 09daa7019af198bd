"""What this machine's CPU has for bfloat16."""

from __future__ import annotations


def has_amx() -> bool:
    """Return whether it multiplies tiles of bfloat16 (Intel's AMX), by which whole models run several times as fast."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def has_bf16_units() -> bool:
    """Return whether it multiplies bfloat16 by itself at all, with AMX or AVX512-BF16."""
    import torch

    return has_amx() or bool(torch.cpu._is_avx512_bf16_supported())
