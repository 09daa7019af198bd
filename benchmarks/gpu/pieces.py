"""The pieces of the proof: each a function from sizes to readings, none longer than nine minutes on a card.

Correctness stands first; what it proves is what the later pieces time. Letters: B tokens, D model width, F latents.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.predictions import FIRST_PATH_MS, roofline_ms, state_gb

Readings = list[dict[str, Any]]
ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("relu", "topk", "batchtopk", "matryoshka", "gated", "jumprelu")


@dataclass(frozen=True)
class Sizes:
    """How large the pieces are; `tiny` lets all of them run on a CPU within a minute or two."""

    device: str = "cuda"
    widths: tuple[int, ...] = (12_288, 49_152, 262_144)
    batches: tuple[int, ...] = (4096,)
    d_model: int = 768
    k: int = 32
    million: int = 1_048_576
    rounds: int = 3
    steps: int = 20
    rows: int = 1_000_000
    products: tuple[tuple[int, int, int], ...] = ((4096, 768, 12_288), (4096, 768, 49_152), (8192, 8192, 8192))
    copy_bytes: int = 2**31
    limit_s: int = 540
    python: str = field(default=sys.executable)

    @classmethod
    def tiny(cls) -> Sizes:
        return cls(
            device="cpu",
            widths=(256,),
            batches=(64,),
            d_model=32,
            k=4,
            million=1024,
            rounds=1,
            steps=1,
            rows=6_000,
            products=((64, 32, 256),),
            copy_bytes=2**20,
        )


class PieceFailed(Exception):
    """A command of a piece that did not end well: its last words."""


def run(sizes: Sizes, *command: str) -> str:
    """Run one of the project's own commands from its root; returns what it printed."""
    try:
        done = subprocess.run(
            [sizes.python, *command], cwd=ROOT, capture_output=True, text=True, timeout=sizes.limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise PieceFailed(f"{' '.join(command[:4])} took more than {sizes.limit_s} s") from None
    if done.returncode:
        words = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise PieceFailed(" / ".join(words[-3:]))
    return done.stdout


def timed(act: Callable[[], object], device: str, repeats: int = 10) -> float:
    """Return the median milliseconds of `act`, the device waited for around each."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(min(2, repeats - 1)):
        act()
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        act()
        wait()
        seconds.append(time.perf_counter() - start)
    return 1e3 * sorted(seconds)[len(seconds) // 2]


# Correctness


def kernels(sizes: Sizes, folder: Path) -> Readings:
    """Hold every kernel against float64 and the sparse form against the dense one, where the kernels run."""
    said = run(sizes, "-m", "pytest", "-q", "-m", "slow", "-W", "default", "tests/train/sae/sparse")
    return [{"name": "kernels against float64", "reading": said.strip().splitlines()[-1]}]


def variants(sizes: Sizes, folder: Path) -> Readings:
    """Train each variant, stop it half-way, go on, and train it whole: the same weights, or how far apart."""
    from safetensors.torch import load_file

    cache, trainer = folder / "cache", "trainer=gpu" if sizes.device == "cuda" else "trainer=cpu"
    harvest(sizes, cache)
    found: Readings = []
    tokens = sizes.rows // 2
    for variant in VARIANTS:
        settings = [f"cache={cache}", f"sae={variant}", f"tokens={tokens}", "batch=512", "calibration_tokens=1024"]
        settings += [f"heldout_tokens={min(50_000, sizes.rows // 20)}", trainer]
        for name in ("once", "again"):
            run(sizes, "-m", "train", *settings, f"hydra.run.dir={folder / variant / name}")
        one, other = (load_file(folder / variant / name / "sae.safetensors") for name in ("once", "again"))
        apart = max(float((one[key].float() - other[key].float()).abs().max()) for key in one)
        finite = all(bool(torch.isfinite(value).all()) for value in one.values())
        found.append(
            {"name": f"{variant}: two runs differ by at most", "reading": apart, "expected": 0.0, "finite": finite}
        )
    return found


def harvest(sizes: Sizes, cache: Path) -> None:
    """Harvest the embedded model into `cache`, unless it holds it."""
    device = "model.device=cuda" if sizes.device == "cuda" else "model.device=cpu"
    run(sizes, "-m", "harvest", device, f"tokens={sizes.rows}", f"heldout_tokens={sizes.rows // 10}", f"cache={cache}")


# Rates


def ceilings(sizes: Sizes, folder: Path) -> Readings:
    """Read the card's own rates: copies, and products in each precision."""
    found: Readings = []
    x = torch.empty(sizes.copy_bytes // 4, device=sizes.device).normal_()
    y = torch.empty_like(x)
    ms = timed(lambda: y.copy_(x), sizes.device)
    found.append({"name": "copy, GB/s read and written", "reading": 2 * sizes.copy_bytes / ms / 1e6, "expected": 3000})
    for batch, d_model, width in sizes.products:
        a = torch.randn(batch, d_model, device=sizes.device)
        b = torch.randn(width, d_model, device=sizes.device)
        flops = 2 * batch * d_model * width
        for precision, expected in (("highest", 55), ("high", 400)):
            torch.set_float32_matmul_precision(precision)
            ms = timed(lambda a=a, b=b: torch.mm(a, b.t()), sizes.device)  # type: ignore[misc]
            name = f"product {batch}x{d_model}x{width} {'tf32' if precision == 'high' else 'float32'}, TFLOP/s"
            found.append({"name": name, "reading": flops / ms / 1e9, "expected": expected})
        half_a, half_b = a.bfloat16(), b.bfloat16()
        ms = timed(lambda a=half_a, b=half_b: torch.mm(a, b.t()), sizes.device)  # type: ignore[misc]
        name = f"product {batch}x{d_model}x{width} bf16, TFLOP/s"
        found.append({"name": name, "reading": flops / ms / 1e9, "expected": 790})
    torch.set_float32_matmul_precision("highest")
    return found


def kernel_rates(sizes: Sizes, folder: Path) -> Readings:
    """Time the update, the matrices' gradients and the error's kernel beside the bytes that they must move."""
    found: Readings = []
    for width in sizes.widths:
        shape = ("--width", str(width), "--d-model", str(sizes.d_model), "--batch", str(sizes.batches[0]))
        said = run(sizes, "-m", "benchmarks.gpu.kernel_rates", "--device", sizes.device, *shape, "--k", str(sizes.k))
        found += [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return found


def graphs(sizes: Sizes, folder: Path) -> Readings:
    """Take steps by CUDA graphs and without: how far the weights are apart, and the milliseconds of each."""
    found: Readings = []
    shape = ("--width", str(sizes.widths[0]), "--d-model", str(sizes.d_model), "--batch", str(sizes.batches[0]))
    k = ("--k", str(sizes.k), "--steps", str(sizes.steps + 2))
    for variant in ("topk", "batchtopk", "matryoshka"):
        said = run(sizes, "-m", "benchmarks.gpu.graphs", "--device", sizes.device, "--variant", variant, *shape, *k)
        found += [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return found


def step_cells(sizes: Sizes, out: Path, width: int, names: tuple[str, ...], *more: str) -> list[dict[str, Any]]:
    """Return cells of `benchmarks.step` at one width: {"spec", "rows"} each."""
    precision = "tf32" if sizes.device == "cuda" else "float32"
    options = {
        "--width": width,
        "--d-model": sizes.d_model,
        "--k": sizes.k,
        "--l0": 3 * sizes.k,
        "--rounds": sizes.rounds,
        "--steps": sizes.steps,
        "--device": sizes.device,
        "--precision": precision,
        "--out": out,
    }
    given = [str(part) for pair in options.items() for part in pair]
    run(sizes, "-m", "benchmarks.step", *given, "--batches", *map(str, sizes.batches), "--only", *names, *more)
    cells: list[dict[str, Any]] = json.loads(out.read_text())
    return cells


def steps(sizes: Sizes, folder: Path) -> Readings:
    """Time a step of every variant beside the sparse floor, by width; BatchTopK and TopK beside their roofline."""
    found: Readings = []
    for width in sizes.widths:
        for variant in VARIANTS:
            out = folder / f"step-{variant}-{width}.json"
            try:
                cells = step_cells(sizes, out, width, ("ours", "sparse-floor"), "--variants", variant, "--dead", "0")
            except PieceFailed as error:
                found.append({"name": f"{variant} F={width:,}", "failed": str(error)})
                continue
            found += [step_reading(cell) for cell in cells]
    return found


def step_reading(cell: dict[str, Any]) -> dict[str, Any]:
    """Return one line: milliseconds, tokens a second, the ratio to the floor and to the estimated roofline."""
    spec, rows = cell["spec"], cell["rows"]
    name = f"{spec['variant']} F={spec['width']:,} B={spec['batch']:,}"
    if "failed" in rows["ours"]:
        return {"name": name, "failed": rows["ours"]["failed"]}
    ms = sorted(rows["ours"]["ms"])[len(rows["ours"]["ms"]) // 2]
    floor = sorted(rows["sparse-floor"]["ms"])[len(rows["sparse-floor"]["ms"]) // 2]
    least = roofline_ms(spec["batch"], spec["d_model"], spec["width"], spec["k"])
    return {
        "name": f"{name}, ms a step",
        "reading": ms,
        "expected": FIRST_PATH_MS.get(spec["width"]),
        "tokens_per_s": 1e3 * spec["batch"] / ms,
        "of_floor": ms / floor,
        "of_roofline": ms / least,
        "device_mb": rows["ours"]["device_mb"],
    }


def million(sizes: Sizes, folder: Path) -> Readings:
    """Train a million latents for a few steps: time, and memory beside the state's bytes."""
    cells = step_cells(
        sizes,
        folder / "million.json",
        sizes.million,
        ("ours", "sparse-floor"),
        "--variants",
        "batchtopk",
        "--dead",
        "0",
    )
    reading = step_reading(cells[0])
    return [reading | {"state_gb": state_gb(sizes.d_model, sizes.million)}]


# From end to end


def end_to_end(sizes: Sizes, folder: Path) -> Readings:
    """Train from the cache with the whole trainer around the step: its share of the bare steps' speed."""
    trainer = "gpu" if sizes.device == "cuda" else "cpu"
    shape = f"{sizes.d_model}x{sizes.widths[0]}x{sizes.batches[0]}"
    turns = ["--turns", str(max(2, sizes.rounds)), "--steps", str(max(2, sizes.steps))]
    said = run(sizes, "-m", "benchmarks.trainer", "--shapes", shape, "--saes", "1", "--trainer", trainer, *turns)
    return [{"name": f"trainer around the step, {shape}", "reading": said.strip().splitlines()[-1]}]


def harvesting(sizes: Sizes, folder: Path) -> Readings:
    """Measure the harvest: share of the bare forward's speed, with one site and with five."""
    on = ("--models", "embedded", "--device", sizes.device)
    said = run(sizes, "-m", "benchmarks.harvest", *on, "--rounds", str(sizes.rounds))
    lines = [line for line in said.splitlines() if line.strip()]
    return [{"name": "harvest beside the bare forward", "reading": " | ".join(lines[-4:])}]


PIECES: dict[str, Callable[[Sizes, Path], Readings]] = {
    "kernels": kernels,
    "variants": variants,
    "ceilings": ceilings,
    "kernel_rates": kernel_rates,
    "graphs": graphs,
    "steps": steps,
    "million": million,
    "end_to_end": end_to_end,
    "harvesting": harvesting,
}
