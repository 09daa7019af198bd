"""Prove the GPU path on a card, piece by piece: correctness first, then readings beside what was expected.

    python -m benchmarks.gpu                        every piece that --out does not hold yet
    python -m benchmarks.gpu --pieces kernels steps
    python -m benchmarks.gpu --tiny                 all of them on a CPU, with tiny sizes: does the proof itself run?

Each piece takes at most nine minutes and is written down as it ends, so a proof that is broken off goes on with the
same command. What --out holds is printed as one table at the end: readings, and predictions beside them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.pieces import PIECES, PieceFailed, Sizes


def machine(device: str) -> dict[str, str]:
    """Return what the readings were taken on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def prove(names: list[str], sizes: Sizes, out: Path) -> dict[str, Any]:
    """Run the pieces that `out` lacks, each written down as it ends; returns all that it holds."""
    held: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"machine": machine(sizes.device)}
    if held["machine"] != machine(sizes.device):
        raise SystemExit(f"{out} holds readings of {held['machine']}: name another file with --out")
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in held and "failed" not in held[name]:
            print(f"{name}: done before")
            continue
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        try:
            held[name] = {"readings": PIECES[name](sizes, folder)}
        except PieceFailed as error:
            held[name] = {"readings": [], "failed": str(error)}
        held[name]["seconds"] = round(time.perf_counter() - start, 1)
        part = out.with_name(out.name + ".part")
        part.write_text(json.dumps(held, indent=1))
        part.replace(out)
    return held


def number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | int) and not isinstance(value, bool) else str(value)


def table(held: dict[str, Any]) -> str:
    """Return a Markdown table of every reading, with what was expected and what else was read."""
    lines = ["| piece | what | reading | expected | more |", "| :-- | :-- | --: | --: | :-- |"]
    for name, piece in held.items():
        if name == "machine":
            continue
        if "failed" in piece:
            lines.append(f"| {name} | failed: {piece['failed']} | | | |")
        for row in piece["readings"]:
            more = {key: value for key, value in row.items() if key not in ("name", "reading", "expected")}
            told = ", ".join(f"{key} {number(value)}" for key, value in more.items())
            expected = "" if row.get("expected") is None else number(row["expected"])
            lines.append(f"| {name} | {row['name']} | {number(row.get('reading', ''))} | {expected} | {told} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The proof on a GPU.")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu-proof.json"))
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with tiny sizes")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device is here: add --tiny to try the proof itself on a CPU")
    if args.out.suffix != ".json":  # the readings' folder has its name without the ending
        parser.error(f"--out {args.out} is to be a file that ends in .json, such as outputs/gpu-proof.json")
    held = prove(args.pieces, Sizes.tiny() if args.tiny else Sizes(), args.out.resolve())
    print(f"\n{held['machine']}\n\n{table(held)}")
    if any("failed" in piece for name, piece in held.items() if name != "machine"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
