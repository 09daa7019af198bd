"""The formats by name, and which of them a folder is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.base.errors import UserError
from train.interop import dictionary_learning, saelens, sparsify
from train.interop.foreign import Files, Foreign, Origin
from train.sae.base import SAE


@dataclass(frozen=True)
class Format:
    """files: names and content of the files of a folded SAE; UserError where the format cannot hold it.

    read: the SAE of a folder. holds: the names of its files. loading: Python that loads the folder `{folder}`.
    """

    name: str
    holds: tuple[str, str]
    files: Callable[[SAE, Origin], Files]
    read: Callable[[Path], Foreign]
    loading: str


_MODULES = {"SAELens": saelens, "dictionary_learning": dictionary_learning, "sparsify": sparsify}
FORMATS = {
    name.lower(): Format(name, module.HOLDS, module.files, module.read, module.LOADING)
    for name, module in _MODULES.items()
}


def format_of(folder: Path) -> Format:
    """Find the format whose files a folder holds; UserError where it is none of them."""
    for known in FORMATS.values():
        if all((folder / name).is_file() for name in known.holds):
            return known
    pairs = "; ".join(f"{known.name}: {' and '.join(known.holds)}" for known in FORMATS.values())
    raise UserError(f"{folder} is of none of the formats that are read here ({pairs}): name a folder that is")
