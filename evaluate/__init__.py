"""Score trained SAEs on held-out text: reconstruction, firing, and what a splice costs the language model.

`evaluate.evaluate(saes="outputs/train")` gives a `Report`; `encode_text` and `steer_text` try one SAE on a text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import data  # noqa: F401  (sets how threads wait, before torch is imported)
from data.base.lazy import getattr_of

if TYPE_CHECKING:
    from evaluate.own_text import EncodedText, encode_text, steer_text
    from evaluate.result import Report
    from evaluate.run import evaluate

__all__ = ["EncodedText", "Report", "encode_text", "evaluate", "steer_text"]

# Imported when they are first used, so that naming this package needs no torch.
_HOMES = {
    "EncodedText": "evaluate.own_text",
    "Report": "evaluate.result",
    "encode_text": "evaluate.own_text",
    "evaluate": "evaluate.run",
    "steer_text": "evaluate.own_text",
}


__getattr__ = getattr_of(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
