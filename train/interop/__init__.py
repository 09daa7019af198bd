"""SAEs as other tools keep them: one module a format, each of which writes a folder and reads one."""

from train.interop.formats import FORMATS, format_of

__all__ = ["FORMATS", "format_of"]
