"""What a training says when all its SAEs are there: how they rank at each L0, and how to evaluate them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.base.command import override


def evaluate_line(folders: Sequence[Path]) -> str:
    """Return the command that evaluates the SAEs in `folders`: their common folder, where they are several."""
    folder = str(folders[0]) if len(folders) == 1 else os.path.commonpath(folders)
    return f"evaluate {'it' if len(folders) == 1 else 'them'}: .venv/bin/python -m evaluate {override('saes', folder)}"


def ranked_lines(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rank the SAEs of a pass, by name, on the held-out rows: those of about one L0 together, the lowest NMSE first.

    records: what config.json says of each training. Empty where fewer than two SAEs were validated.
    """
    from train.sae.metrics import one_l0_groups

    known = {name: record["heldout"] for name, record in records.items() if record.get("heldout")}
    if len(known) < 2:
        return []
    names = list(known)
    groups = [
        sorted((names[i] for i in group), key=lambda name: known[name]["nmse"])
        for group in one_l0_groups([known[name]["l0"] for name in names])
    ]
    width = max(map(len, names))
    lines = ["held-out NMSE of the SAEs at each L0 (within 5%), best first:"]
    for group in groups:
        for place, name in enumerate(group):
            mark = "  best at its L0" if place == 0 and len(group) > 1 else ""
            lines.append(f"  {name:{width}}  L0 {known[name]['l0']:6.1f}  NMSE {known[name]['nmse']:.4f}{mark}")
    return lines
