"""SAEs as other tools keep them: one module a format, each of which writes a folder and reads one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.base.lazy import getattr_of

if TYPE_CHECKING:
    from train.interop.formats import FORMATS, format_of

__all__ = ["FORMATS", "format_of"]

# Imported when they are first used: the commands of this package answer --help without torch.
__getattr__ = getattr_of(__name__, dict.fromkeys(__all__, "train.interop.formats"))
