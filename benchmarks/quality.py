"""Our SAEs beside dictionary_learning's and sae_lens': the same rows, order and tokens, at equal L0, over seeds.

    make peers
    python -m benchmarks.quality --model path/to/stories260K --text path/to/tinystories.jsonl [--tokens 400000]
    python -m benchmarks.quality --tokens 400000 --site resid_post.3          # the embedded model
    python -m benchmarks.quality --dictionary --tokens 400000                 # rows made of known features

Ours train at the defaults of conf/ but for the learning rate where --lr gives one. A peer trains at each of --rates
with the first seed, then with all seeds at the one of lowest NMSE. All are scored in their inference form by the same
evaluation (`python -m evaluate`): the peers' SAEs are brought here by `train.interop.import_sae`. TopK has an L0 of k
by its nature; a threshold may be off by some per cent, so NMSE and CE increase are also read at L0 = k, along the slope
that --slope states. A peer whose sparsity has a coefficient alone is trained until its L0 is near k (`train_peer`). A
dictionary (benchmarks/dictionary.py) has no language model, so no CE increase, but the share of its features that a
decoder row has found. Intervals are of 95% over seeds (Student's t). Silent: latents that fire on no held-out token.

Everything is written below --out and made once; give the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.contestants.process import ROOT
from benchmarks.contestants.spec import VARIANTS
from benchmarks.contestants.train_peer import LIBRARIES, PENALTY, Job
from benchmarks.dictionary import SITE, Dictionary
from data.loading.loader import ActivationLoader
from data.loading.order import split_calibration
from data.loading.reader import open_reader
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import Store
from evaluate.report.markdown import table
from train.sae import Batch, load
from train.sae.metrics import held_out
from train.sae.weights_folder import folders_below

OURS = "ours"
CALIBRATION, POOL_CHUNKS = 65_536, 62  # as conf/train.yaml has them: they are part of the order of rows


@dataclass(frozen=True)
class Score:
    """What the evaluation says of one SAE."""

    library: str
    variant: str
    seed: int
    rate: float | None
    l0: float
    nmse: float
    ce_increase: float
    silent: int
    found: float = float("nan")
    """The share of the dictionary's features that it found; nan where they are not known."""

    def at(self, k: int, slope: float) -> Score:
        """Read the errors at an L0 of k, where both fall with L0 to the power of -slope."""
        factor = (self.l0 / k) ** slope
        return replace(self, nmse=self.nmse * factor, ce_increase=self.ce_increase * factor)


def command(*arguments: str) -> None:
    """Run a stage as a user would; ends this program where it fails."""
    print("python " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train_ours(options: argparse.Namespace, lm: Sequence[str]) -> None:
    """Make the store, and train our SAEs of all variants and seeds."""
    rows = options.tokens + CALIBRATION + 65_536
    if options.dictionary:
        store = Dictionary().write(options.out / "cache", rows, options.heldout)
        shared = [f"store={store.path}"]
    else:
        shared = [*lm, f"packing.context={options.context}", f"cache={options.out / 'cache'}"]
        size = [f"tokens={rows}", f"heldout_tokens={options.heldout}"]
        command("-m", "harvest", *shared, f"sites=[{options.site}]", *size)
    train = ["-m", "train", "-m", *shared, f"site={options.site}", f"tokens={options.tokens}", "heldout_tokens=0"]
    train += [f"sae={','.join(options.variants)}", f"sae.k={options.k}", f"sae.expansion={options.expansion}"]
    train += [f"seed={','.join(map(str, options.seeds))}", f"hydra.sweep.dir={options.out / OURS}"]
    if options.lr is not None:
        train.append(f"optimizer.lr={options.lr:g}")
    command(*train)


def write_batches(store: Store, site: str, seed: int, options: argparse.Namespace, path: Path) -> None:
    """Write the batches that our training with this seed took, in its order and in model units: [steps, B, D]."""
    reader = open_reader(store, TRAIN, site)
    chunks, _ = split_calibration(reader.sizes, CALIBRATION, seed)
    loader = ActivationLoader(reader, batch=options.batch, chunks=chunks, seed=seed, pool_chunks=POOL_CHUNKS)
    decode = store.decoder(TRAIN, site)
    steps = options.tokens // options.batch
    beside = path.with_suffix(".part")
    out = np.lib.format.open_memmap(beside, "w+", np.float32, (steps, options.batch, decode.width))
    for step, rows in zip(range(steps), loader, strict=False):
        out[step] = decode(rows).float().numpy()
    out.flush()
    beside.replace(path)


def train_peers(jobs: Sequence[Job], python: Path) -> None:
    """Train what is not there yet, in the peers' environment."""
    missing = [asdict(job) for job in jobs if not Path(job.out).exists()]
    if not missing:
        return
    print(f"{len(missing)} trainings in {python.parent.parent}", flush=True)
    worker = [str(python), "-W", "ignore", "-m", "benchmarks.contestants.train_peer"]
    subprocess.run(worker, cwd=ROOT, input=json.dumps(missing), text=True, check=True, stdout=subprocess.DEVNULL)


def import_peers(jobs: Iterable[Job], store: Path, site: str, out: Path) -> None:
    """Bring the peers' SAEs here, each into a folder of its name in `out`."""
    for job in jobs:
        target = out / Path(job.out).name
        if not target.exists():
            source = [f"saes={job.out}", f"store={store}", f"site={site}", f"out={target}"]
            command("-m", "train.interop.import_sae", *source)


def scores(
    options: argparse.Namespace, folders: Path, named: dict[str, tuple[str, str, int, float | None]]
) -> list[Score]:
    """Score every SAE below a folder; `named`: (library, variant, seed, rate) of each by its folder's name."""
    if options.dictionary:
        return [scored_on_rows(options, path, named[path.name]) for path in folders_of(folders) if path.name in named]
    report = folders / "report.json"
    if not report.exists():
        where = [f"saes={folders}", f"cache={options.out / 'cache'}", f"out={folders}"]
        command("-m", "evaluate", *where, f"tokens={options.heldout}")
    made = []
    for site in json.loads(report.read_text())["sites"]:
        for row in site["saes"]:
            if row["form"] != "batch" and Path(row["folder"]).name in named:
                value = {name: row["metrics"][name]["value"] for name in ("l0", "nmse", "ce_increase")}
                made.append(Score(*named[Path(row["folder"]).name], **value, silent=row["l0"]["silent"]))
    return made


def folders_of(place: Path) -> list[Path]:
    """List the folders of SAEs in or below a folder."""
    return sorted(folders_below(place))


def scored_on_rows(options: argparse.Namespace, folder: Path, named: tuple[str, str, int, float | None]) -> Score:
    """Score an SAE on the dictionary's held-out rows, and count the features it found."""
    sae = load(folder).eval()
    store = Store.open(options.store)
    decode = store.decoder(HELDOUT, SITE)
    loader = ActivationLoader(open_reader(store, HELDOUT, SITE), batch=options.batch, shuffle=False)
    rows = (Batch(decode(batch).float()) for batch in loader)
    (value,) = held_out([sae], rows, torch.device("cpu"))
    found = Dictionary().found(sae.W_dec)
    return Score(*named, value["l0"], value["nmse"], float("nan"), int(value["silent"]), found)


def jobs_of(
    options: argparse.Namespace,
    seeds: Iterable[int],
    rates: dict[tuple[str, str], Sequence[float]],
    penalties: dict[tuple[str, str], float] | None = None,
) -> list[Job]:
    """List the peers' trainings: of each library and variant at its rates, with each seed.

    penalties: where the search for a coefficient begins.
    """
    return [
        Job(
            library,
            variant,
            str(options.out / f"batches-{seed}.npy"),
            options.width,
            options.k,
            rate,
            seed,
            str(options.out / "peers" / f"{library}-{variant}-{rate:g}-{seed}"),
            (penalties or {}).get((library, variant)),
        )
        for (library, variant), tried in rates.items()
        for rate in tried
        for seed in seeds
    ]


def penalties_of(jobs: Iterable[Job], best: dict[tuple[str, str], Sequence[float]]) -> dict[tuple[str, str], float]:
    """Read the coefficients that the searches at the best rates found."""
    found = {}
    for job in jobs:
        path = Path(job.out) / PENALTY
        if path.exists() and job.lr in best.get((job.library, job.variant), ()):
            found[job.library, job.variant] = json.loads(path.read_text())["penalty"]
    return found


def name_of(job: Job) -> dict[str, tuple[str, str, int, float | None]]:
    return {Path(job.out).name: (job.library, job.variant, job.seed, job.lr)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Give the mean over seeds and half the width of its 95% interval; nan of one seed."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def results(made: Sequence[Score], k: int, slope: float, width: int) -> str:
    """Write a table, for each variant a row a library: means over seeds with their intervals."""
    heads = ["variant", "trainer", "rate", "seeds", "L0", "NMSE", f"NMSE at L0 {k}", f"CE increase at L0 {k}", "silent"]
    known = any(one.found == one.found for one in made)  # else nan
    if known:
        heads[-2:] = ["silent", "features found"]
    rows = []
    by_row: dict[tuple[str, str], list[Score]] = {}
    for one in made:
        by_row.setdefault((one.variant, one.library), []).append(one)
    for (variant, library), group in by_row.items():
        read = [one.at(k, slope) for one in group]
        figures = [
            (interval([one.l0 for one in group]), 2),
            (interval([one.nmse for one in group]), 4),
            (interval([one.nmse for one in read]), 4),
        ]
        if not known:
            figures.append((interval([one.ce_increase for one in read]), 4))
        shares = [interval([one.silent / width * 100 for one in group])]
        if known:
            shares.append(interval([one.found * 100 for one in group]))
        cells = [f"{mean:.{digits}f} ± {half:.{digits}f}" for (mean, half), digits in figures]
        cells += [f"{mean:.1f} ± {half:.1f}%" for mean, half in shares]
        rate = "default" if group[0].rate is None else f"{group[0].rate:g}"
        rows.append([variant, library, rate, str(len(group)), *cells])
    return table(heads, sorted(rows, key=lambda row: VARIANTS.index(row[0])))


def best_rates(made: Sequence[Score], k: int, slope: float) -> dict[tuple[str, str], Sequence[float]]:
    """Choose for each library and variant the rate of lowest NMSE at an L0 of k."""
    best: dict[tuple[str, str], Score] = {}
    for one in made:
        key = one.library, one.variant
        if key not in best or one.at(k, slope).nmse < best[key].at(k, slope).nmse:
            best[key] = one
    return {key: [one.rate] for key, one in best.items() if one.rate is not None}


def saved_name(sae: Path) -> tuple[str, str, int, float | None]:
    """Read the variant and the seed of one of ours; its rate was the default."""
    config = json.loads((sae / "config.json").read_text())
    return OURS, config["variant"], config["training"]["seed"], None


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the folder of a language model; without it the embedded one")
    parser.add_argument("--text", help="its text, a .txt, .jsonl or .parquet file")
    parser.add_argument("--dictionary", action="store_true", help="rows of known features in place of a model's")
    parser.add_argument("--site", default="resid_post.2")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--context", type=int, default=256, help="tokens of a context")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--heldout", type=int, default=25_000, help="tokens to score")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--expansion", type=int, default=8, help="latents over the site's width")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[4e-3, 1e-2, 2.5e-2], help="learning rates of the peers"
    )
    parser.add_argument("--lr", type=float, help="our learning rate, in place of the default")
    parser.add_argument("--slope", type=float, default=0.6, help="-d log NMSE / d log L0")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"), help="`make peers`")
    parser.add_argument("--out", type=Path, default=Path("outputs/quality"))
    options = parser.parse_args(arguments)
    if not options.peers_python.exists():
        parser.error(f"{options.peers_python} is missing: run `make peers`")
    if (options.model is None) != (options.text is None):
        parser.error("--model and --text go together")
    if options.dictionary:
        if options.model:
            parser.error("--dictionary makes its own rows: leave out --model")
        options.site = SITE
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    lm = []
    if options.model:
        lm = [f"model.name={options.model}", "text=files", f"text.paths=[{options.text}]"]
    train_ours(options, lm)
    folders = folders_of(options.out / OURS)
    record = json.loads((folders[0] / "config.json").read_text())
    options.width = record["settings"]["width"]
    store_path = options.out / "cache" / record["store"]
    options.store, store = store_path, Store.open(store_path)
    for seed in options.seeds:
        path = options.out / f"batches-{seed}.npy"
        if not path.exists():
            write_batches(store, options.site, seed, options, path)
    made = scores(options, options.out / OURS, {folder.name: saved_name(folder) for folder in folders})

    pairs = [(library, variant) for library in options.libraries for variant in options.variants]
    trials = jobs_of(options, options.seeds[:1], dict.fromkeys(pairs, options.rates))
    train_peers(trials, options.peers_python)
    import_peers(trials, store_path, options.site, options.out / "trials")
    names = {name: value for job in trials for name, value in name_of(job).items()}
    tried = scores(options, options.out / "trials", names)
    best = best_rates(tried, options.k, options.slope)
    chosen = jobs_of(options, options.seeds, best, penalties_of(trials, best))
    train_peers(chosen, options.peers_python)
    import_peers(chosen, store_path, options.site, options.out / "chosen")
    names = {name: value for job in chosen for name, value in name_of(job).items()}
    made += scores(options, options.out / "chosen", names)

    where = f"{store.manifest.name}, {options.site}: {options.width} latents, {options.tokens:,} tokens"
    print(f"{where}; peers tried at {', '.join(f'{rate:g}' for rate in options.rates)}\n")
    print(results(made, options.k, options.slope, options.width))


if __name__ == "__main__":
    main()
