"""Record what the demo computed, and compare two such records: the proof that a change altered no number.

    python .ci/fingerprint.py record FILE.json [FOLDER]     after `make demo`; FOLDER: the checkout, by default this one
    python .ci/fingerprint.py compare BEFORE.json AFTER.json

A record holds the sha256 of every SAE's weights, of every chunk file and commit record of the store, and the numbers
of the report. `compare` names each thing that differs and ends with exit code 1 where any does.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

CLOCK = ("/training/seconds", "/training/waited")  # of the same run another time it is another number


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(value: Any, at: str = "") -> dict[str, float]:
    """{path in the report: number} of all that is numeric but what the clock says; texts, as of folders, are out."""
    if at.endswith(CLOCK) or isinstance(value, bool) or value is None or isinstance(value, str):
        return {}
    if isinstance(value, int | float):
        return {at: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, float] = {}
    for key, part in items:
        found |= numbers(part, f"{at}/{key}")
    return found


def record(folder: Path) -> dict[str, Any]:
    outputs = folder / "outputs"
    saes = sorted(outputs.glob("demo/saes/*/sae.safetensors"))
    files = [path for path in sorted(outputs.glob("cache/*/**/*")) if path.is_file()]
    stored = [path for path in files if path.name.startswith("c.") or "commits" in path.parts]
    report = json.loads((outputs / "demo" / "report.json").read_text())
    sites = [{key: part for key, part in site.items() if key != "fingerprint"} for site in report["sites"]]
    return {
        "saes": {path.parent.name: sha256(path) for path in saes},
        "store": {str(path.relative_to(outputs / "cache")): sha256(path) for path in stored},
        "report": numbers(sites),
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    told = []
    for part in ("saes", "store", "report"):
        old, new = before[part], after[part]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                told.append(f"{part}: {name}: {old.get(name, 'absent')} before, {new.get(name, 'absent')} after")
    return told


def main() -> None:
    command, *paths = sys.argv[1:]
    if command == "record":
        folder = Path(paths[1]) if len(paths) > 1 else Path(__file__).resolve().parents[1]
        found = record(folder)
        Path(paths[0]).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print({part: len(values) for part, values in found.items()})
        return
    told = compare(*(json.loads(Path(path).read_text()) for path in paths))
    print("\n".join(told) or "equal: every SAE, every file of the store, every number of the report")
    raise SystemExit(1 if told else 0)


if __name__ == "__main__":
    main()
