"""What a harvest costs beside the forward that it cannot do without, in ratios of one run.

    python -m benchmarks.harvest [--models gpt2 embedded] [--rounds 5] [--peer-python <python with sae-lens>]

The limit is the bare forward: the same model and batches, ended after the last site, nothing kept. Ours is the real
harvester with a real store on disk, synced as ever. The methods take turns, so that another load on the machine hits
all of them; a share is the median over the rounds. First the memory: the peak above what the model and a forward take.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.base.cli import keep_freed_memory
from data.base.sites import Site
from data.store.layout import ITEMSIZE, Layout
from data.store.manifest import TRAIN, Manifest
from data.store.store import Store
from harvest import lm
from harvest.harvester import Harvester, widths_of
from harvest.hooks import locate, run_to
from harvest.packing import PackedTokens
from harvest.units import plan

Method = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Trial:
    """A model with its sites, the last of which is the same with one and with five, and the shape of its run."""

    name: str
    model: Any
    sites: tuple[str, ...]
    context: int
    lm_batch: int
    chunk_rows: int  # about 6 MB, as chosen by default
    chunks_per_unit: int
    units: int  # of a turn

    @property
    def unit_contexts(self) -> int:
        return self.chunk_rows * self.chunks_per_unit // self.context

    @property
    def tokens(self) -> int:
        return self.units * self.unit_contexts * self.context

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    def text(self, units: int) -> PackedTokens:
        """Return the random tokens, of which one in a context is not kept, as a BOS would not be."""
        shape = (units * self.unit_contexts, self.context)
        contexts = np.random.default_rng(0).integers(3, self.config.vocab_size, shape, dtype=np.int32)
        keep = np.ones(shape, np.bool_)
        keep[:, 0] = False
        return PackedTokens(contexts, keep)


def gpt2() -> Trial:
    """Return GPT-2 small with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sites = tuple(f"resid_post.{layer}" for layer in (11, 3, 5, 7, 9))
    return Trial("gpt2", GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False), sites, 1024, 2, 2048, 1, 2)


def embedded() -> Trial:
    model_cfg = {"name": "embedded", "device": "cpu"}
    model, context = lm.load_model(model_cfg), lm.LanguageModel.of(model_cfg).context_limit
    layers = model.config.get_text_config().num_hidden_layers
    sites = [f"{kind}.{layer}" for layer in reversed(range(layers)) for kind in ("resid_post", "mlp_out")]
    return Trial("embedded", model, tuple(sites[:5]), context or 256, 16, 4096, 4, 4)


TRIALS = {"gpt2": gpt2, "embedded": embedded}


def bare(trial: Trial) -> Method:
    """Return a method: the forward to the last site."""
    device, site = trial.model.device, [Site.parse(trial.sites[0])]
    ids = torch.from_numpy(trial.text(trial.units).contexts).long().to(device)

    def run() -> float:
        began = time.perf_counter()
        for first in range(0, len(ids), trial.lm_batch):
            run_to(trial.model, site, ids[first : first + trial.lm_batch])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return run


def ours(trial: Trial, folder: Path, dtype: str, n_sites: int, units: int) -> Method:
    """Return a method: the harvester into a new store;
    what the command does before, and the store's removal, are not timed."""
    sites, packed = [Site.parse(site) for site in trial.sites[:n_sites]], {TRAIN: trial.text(units)}
    widths = widths_of(trial.model, sites, packed[TRAIN])
    layout = Layout(dtype, trial.context, trial.chunk_rows, trial.chunks_per_unit, mixing_seed=0)

    def run() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            manifest = Manifest({"layout": asdict(layout)}, {}, trial.name, widths[trial.sites[0]])
            store = Store.create_or_open(Path(cache), manifest)
            worker = Harvester(store, trial.model, packed, widths, trial.lm_batch, quiet=True)
            began = time.perf_counter()
            assert worker.run(plan(store, layout, packed, sites)) == units
            return time.perf_counter() - began

    return run


@contextmanager
def peer(trial: Trial, folder: Path, python: str | None) -> Iterator[Method | str]:
    """Yield sae-lens in its own environment at the first site, or the reason why not."""
    if python is None:
        yield "no --peer-python given"
        return
    site = locate(trial.model, Site.parse(trial.sites[0])).module
    hook = next(name for name, module in trial.model.named_modules() if module is site)
    path = folder / "model"
    trial.model.save_pretrained(path)
    lm.load_tokenizer({"name": "embedded"}).save_pretrained(path)  # asked for, though all it gets are tokens
    sizes = {"width": trial.config.hidden_size, "vocabulary": trial.config.vocab_size, "context": trial.context}
    sizes |= {"batch": trial.lm_batch, "tokens": trial.tokens}
    script = [python, str(Path(__file__).with_name("peer_cache.py")), "--model", str(path), "--hook", hook]
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    with (folder / "errors").open("w+") as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        try:
            process = subprocess.Popen([*script, "--folder", str(folder / "peer"), *options], **pipes)
        except OSError as error:
            yield str(error)
            return
        with process:
            assert process.stdin and process.stdout
            told, pipe = process.stdout, process.stdin

            def run() -> float:
                print(file=pipe, flush=True)
                return float(told.readline())

            if told.readline().strip() == "ready":
                yield run
            else:
                errors.seek(0)
                yield (errors.read().strip().splitlines() or ["it ended"])[-1]
            pipe.close()


def speed(trial: Trial, methods: dict[str, Method], rounds: int) -> dict[str, float]:
    """Print a line a method: median, least and most tokens/s,
    and its share of the first one in the same round, returned."""
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):  # the first warms up
        for name, method in methods.items():
            seconds = method()
            if turn:
                speeds[name].append(trial.tokens / seconds)
    limit, medians = next(iter(speeds.values())), {}
    print(f"{'':<34}{'tokens/s':>10}{'least':>9}{'most':>9}{'of bare':>9}{'least':>9}{'most':>9}")
    for name, values in speeds.items():
        shares = [value / bound for value, bound in zip(values, limit, strict=True)]
        medians[name] = statistics.median(shares)
        line = f"{name:<34}{statistics.median(values):>10.0f}{min(values):>9.0f}{max(values):>9.0f}"
        print(line + f"{medians[name]:>9.3f}{min(shares):>9.3f}{max(shares):>9.3f}", flush=True)
    return medians


def resident(what: str) -> int:
    """Return VmRSS or VmHWM, its peak, of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def peak(method: Method) -> int:
    """Return how many bytes a method takes at most, above what is there before it."""
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is there
    method()
    return max(0, resident("VmHWM") - before)


def memory(trial: Trial, folder: Path, dtype: str) -> tuple[int, int]:
    """Return the peak bytes of a harvest of all sites above what the model and its forward took before,
    and of one twice as long above that."""
    bare(trial)()
    n_sites = len(trial.sites)
    first, longer = (peak(ours(trial, folder, dtype, n_sites, units)) for units in (trial.units, 2 * trial.units))
    rows = trial.unit_contexts * (trial.context - 1)
    unit = rows * n_sites * trial.config.hidden_size * ITEMSIZE[dtype]
    print(
        f"memory, {n_sites} sites: {first / 1e6:.0f} MB above the model and its forward, which is {first / unit:.1f} "
        f"units of {unit / 1e6:.1f} MB; {longer / 1e6:.0f} MB more over twice the tokens"
    )
    return first, longer


def run(trial: Trial, root: Path, dtype: str, rounds: int, python: str | None) -> dict[str, float]:
    """Run all of it for one model and print it; return {method: share of the bare forward}."""
    with tempfile.TemporaryDirectory(dir=root) as name, peer(trial, Path(name), python) as other:
        folder = Path(name)
        print(
            f"{trial.name}: contexts of {trial.context} tokens, {trial.lm_batch} a batch, {trial.units} units of "
            f"{trial.unit_contexts} contexts a turn, stored as {dtype}, {rounds} rounds"
        )
        methods = {f"bare forward to {trial.sites[0]}": bare(trial)}
        for n_sites in (1, len(trial.sites)):
            methods[f"ours, {n_sites} sites"] = ours(trial, folder, dtype, n_sites, trial.units)
        if isinstance(other, str):
            print(f"sae-lens skipped: {other}")
        else:
            methods["sae-lens, 1 site"] = other
        memory(trial, folder, dtype)
        return speed(trial, methods, rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=ITEMSIZE, default="float32")
    parser.add_argument("--peer-python", help="an interpreter that has sae-lens")
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="where trial stores are put, for the run")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        trial = TRIALS[name]()
        trial.model.to(options.device)
        run(trial, options.folder, options.dtype, options.rounds, options.peer_python)


if __name__ == "__main__":
    main()
