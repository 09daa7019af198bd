"""Exported SAEs in the peers' hands: the same function, and what their own evaluations say beside ours.

    python -m benchmarks.agreement --saes outputs/demo/saes --cache outputs/cache [--peers .venv-peers] [--tokens 20000]

Needs `make peers`, and SAEs of one site of a GPT-2 shaped model in a folder (as the demo's). Prints three tables:
encode and decode of every export; L0, explained variance and CE recovered by sae_lens' `run_evals` and by ours on the
same contexts; and what known mistakes of SAE libraries would have reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.base.errors import UserError
from data.base.location import parse_location
from data.store.store import Store
from evaluate.inputs import HeldoutText, SavedSAE, find_saes, group_by_store, open_text
from evaluate.metrics import statistics, totals
from evaluate.score import SiteScore
from evaluate.splice import Splice
from harvest.hooks import Site, run_to
from harvest.lm import EMBEDDED
from train.interop import FORMATS
from train.interop.export import export
from train.interop.foreign import Origin
from train.sae import SAE, load, load_config, save
from train.sae.variants.batchtopk import BatchTopKBase
from train.sae.variants.topk import TopK

ROOT = Path(__file__).resolve().parents[1]
APART = """apart: the difference, for l0 relative.
all, recovered_zero: sae_lens zeroes special tokens too and scores what follows each token that is not special; ours
leaves special tokens as they are in every run and scores the others, so all runs differ at the same positions.
kl: sae_lens counts the last position of each context too; ours the positions that predict a token of the set."""
ROWS = 8192  # activations that encode and decode are compared on
NEAR = 1e-5  # of the threshold, relative
Scores = dict[str, float]


def ask(python: Path, module: str, job: Any) -> str:
    """Run a module in the peers' environment and return what it says."""
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    command = [str(python), "-W", "ignore", "-m", module]
    done = subprocess.run(command, input=json.dumps(job), text=True, cwd=ROOT, env=quiet, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{module} failed in {python}")
    return done.stdout


def margin(sae: SAE, x_ND: Tensor) -> Tensor:
    """Return |z - threshold| / |threshold| of each latent [N, F]; nothing is near a threshold of 0."""
    z_NF = sae.pre_activation(sae.norm.normalise(x_ND))
    threshold: Any = torch.zeros(())
    if isinstance(sae, TopK):
        threshold = z_NF.topk(sae.config.k + 1, dim=1).values[:, -2:].mean(1, keepdim=True)
    elif isinstance(sae, BatchTopKBase):
        threshold = sae.threshold
    elif hasattr(sae, "theta"):
        threshold = sae.theta
    return torch.where(threshold == 0, torch.inf, (z_NF - threshold).abs() / threshold.abs())


@torch.no_grad()
def same_function(saes: Sequence[SavedSAE], x_ND: Tensor, python: Path, room: Path) -> Iterator[str]:
    """Yield a line for each SAE and format: the largest deviations of f and x_hat over the RMS of x."""
    save_file({"x": x_ND}, room / "x.safetensors")
    jobs = []
    for trained in saes:
        for name in FORMATS:
            folder = room / name / trained.folder.name
            try:
                export(trained.folder, name, folder)
            except UserError as error:
                print(f"{trained.folder.name} is not for {name}: {error}")
                continue
            to = str(room / f"{name}-{trained.folder.name}.safetensors")
            jobs.append({"format": name, "folder": str(folder), "x": str(room / "x.safetensors"), "to": to})
    ask(python, "benchmarks.peer_forms", jobs)
    rms_N1 = x_ND.square().mean(1, keepdim=True).sqrt()
    yield f"{'SAE':<24}{'format':<22}{'f: max':>9}{'RMS':>9}{'x_hat: max':>12}{'near T':>10}{'other latents':>15}"
    by_name = {trained.folder.name: load(trained.folder) for trained in saes}
    for job in jobs:
        name, theirs = Path(job["folder"]).name, load_file(job["to"])
        sae = by_name[name]
        f_NF, x_hat_ND = sae.encode_decode(x_ND)
        f_NF /= sae.norm.scale
        if not sae.unit_rows:
            f_NF *= sae.W_dec.norm(dim=1)
        near_NF = margin(sae, x_ND) < NEAR
        moved_NF = ((theirs["f"] > 0) != (f_NF > 0)) & ~near_NF
        off_NF = torch.where(near_NF, 0.0, (theirs["f"] - f_NF).abs() / rms_N1)
        off_x = ((theirs["x_hat"] - x_hat_ND).abs() / rms_N1).max()
        line = f"{name:<24}{job['format']:<22}{off_NF.max():>9.1e}{off_NF[f_NF > 0].square().mean().sqrt():>9.1e}"
        yield line + f"{off_x:>12.1e}{near_NF.float().mean():>10.1e}{int(moved_NF.sum()):>15}"


@torch.no_grad()
def ours(
    store: Store, site: str, saes: Sequence[SAE], text: HeldoutText, keep_BT: Tensor, ids_BT: Tensor
) -> list[Scores]:
    """Return our own figures on these contexts."""
    mean_D = torch.from_numpy(store.stats("train", site).mean)
    dtype = getattr(torch, store.layout.dtype)
    score = SiteScore(Splice(text.model, Site.parse(site)), saes, mean_D, dtype, (len(ids_BT), ids_BT.shape[1]))
    for first in range(0, len(ids_BT), 16):
        score.batch(ids_BT[first : first + 16], keep_BT[first : first + 16], first)
    summaries = [statistics(totals(score.columns(one))) for one in score.scores]
    return [{name: float(value[0]) for name, value in figures.items()} for figures in summaries]


_PAIRS = {"l0": "l0", "ev": "explained_variance", "recovered_zero": "ce_loss_score", "kl": "kl_div_with_sae"}


def beside(name: str, kind: str, mine: Scores, theirs: Scores) -> Iterator[str]:
    """Yield our figures and sae_lens' with what parts them."""
    for key, other in _PAIRS.items():
        relative = abs(mine[key] - theirs[other]) / (abs(mine[key]) if key == "l0" else 1)
        yield f"{name:<24}{kind:<22}{key:<16}{mine[key]:>12.5f}{theirs[other]:>12.5f}{relative:>11.1e}"


def offset(sae: SAE, x_ND: Tensor) -> SAE:
    """Return the SAE with a constant error of half the spread of x, which no residual's variance shows."""
    wrong = copy.deepcopy(sae)
    f_NF, _ = sae.encode_decode(x_ND)
    step_D = torch.zeros(sae.d_in)
    step_D[0] = 0.5 * (x_ND - x_ND.mean(0)).square().sum(1).mean().sqrt() * float(sae.norm.scale)
    moved_F = sae.W_enc_FD.detach() @ step_D if sae.apply_b_dec_to_input else torch.zeros(sae.width)
    with torch.no_grad():
        wrong.b_dec.add_(step_D)
        for bias in sae.bias_names:
            wrong.get_parameter(bias).add_(moved_F)
    assert torch.allclose((wrong.encode(x_ND[:64]) > 0).float().mean(), (f_NF[:64] > 0).float().mean(), atol=1e-3)
    return wrong


@torch.no_grad()
def mistakes(sae: SAE, x_ND: Tensor, dl: Scores, sl: Scores, free: Scores, shifted: dict[str, Scores]) -> Iterator[str]:
    """Yield what known mistakes make of one BatchTopK."""
    assert isinstance(sae, BatchTopKBase)
    xn_ND = sae.norm.normalise(x_ND)
    z_NF, s = sae.pre_activation(xn_ND), float(sae.norm.scale)
    yield f"{'mistake':<76}{'right':>10}{'wrong':>10}"

    def line(what: str, right: float, wrong: float) -> str:
        return f"{what:<76}{right:>10.4f}{wrong:>10.4f}"

    l0 = float((z_NF > sae.threshold).float().sum(1).mean())
    yield line("no threshold shipped, so a plain ReLU: L0", l0, float((z_NF > 0).float().sum(1).mean()))
    unscaled = float((z_NF / s > sae.threshold).float().sum(1).mean())
    yield line("T left in x' units where the rest is in model units: L0", l0, unscaled)
    yield line(
        "EV by ratios averaged over tokens (explained_variance_legacy)", free["ev"], sl["explained_variance_legacy"]
    )
    yield line(
        "EV, constant error added: dictionary_learning centres the residual",
        shifted["ours"]["ev"],
        dl["frac_variance_explained"],
    )
    yield line("EV, constant error added: sae_lens", shifted["ours"]["ev"], shifted["saelens"]["explained_variance"])
    clean, zero, spliced = (free[name] for name in ("ce_clean", "ce_zero", "ce_spliced"))
    yield line("loss recovered as its reciprocal", free["recovered_zero"], (zero - clean) / (zero - spliced))
    kept = [sae.active_batch(part) for part in torch.split(xn_ND, 1024)]
    f_NF = torch.cat([codes.dense(f) for codes, f in kept])
    batch = float(sae.nmse(sae.decode_normalised(f_NF), xn_ND) * sae.variance)
    ships = float(sae.nmse(sae.decode_normalised(sae.encode_normalised(xn_ND)), xn_ND) * sae.variance)
    spread = float((xn_ND - xn_ND.mean(0)).square().sum(1).mean())
    yield line(
        "L0 of the training form (batch top k) for what ships with T", l0, float((f_NF > 0).float().sum(1).mean())
    )
    yield line("NMSE of the training form for what ships with T", ships / spread, batch / spread)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exported SAEs in the peers' hands.")
    parser.add_argument("--saes", default="outputs/demo/saes")
    parser.add_argument("--cache", default="outputs/cache")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--tokens", type=int, default=20_000)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    python = args.peers / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{args.peers} is missing: make peers")
    [(store, by_site)] = group_by_store(find_saes(args.saes), parse_location(args.cache))
    [(site, saes)] = by_site.items()
    text = open_text(store, {"device": "cpu", "device_map": None, "tokens": args.tokens})
    ids_BT, keep_BT = torch.from_numpy(text.packed.contexts).long(), torch.from_numpy(text.packed.keep)
    first = run_to(text.model, [Site.parse(site)], ids_BT[: -(-ROWS // ids_BT.shape[1]) + 1])[site]
    x_ND = first[keep_BT[: len(first)]][:ROWS].contiguous()
    with tempfile.TemporaryDirectory() as room:
        compare(store, site, saes, text, (ids_BT, keep_BT), x_ND, python, Path(room))


def compare(
    store: Store,
    site: str,
    saes: Sequence[SavedSAE],
    text: HeldoutText,
    contexts: tuple[Tensor, Tensor],
    x_ND: Tensor,
    python: Path,
    room: Path,
) -> None:
    """Print the three tables."""
    ids_BT, keep_BT = contexts
    for told in same_function(saes, x_ND, python, room):
        print(told, flush=True)
    loaded = [load(trained.folder) for trained in saes]
    at = next((n for n, sae in enumerate(loaded) if sae.name == "batchtopk"), None)
    names = [trained.folder.name for trained in saes]
    folders = {kind: [str(room / kind / name) for name in names] for kind in ("saelens", "dictionary_learning")}
    if at is not None:
        wrong = offset(loaded[at], x_ND)
        save(wrong, room / "shifted", load_config(saes[at].folder))
        for kind in folders:
            export(room / "shifted", kind, room / f"{kind}-shifted")
            folders[kind].append(str(room / f"{kind}-shifted"))
        loaded.append(wrong)
    save_file({"ids": ids_BT}, room / "ids.safetensors")
    hook = Origin.of(saes[0].config, saes[0].folder).hook
    special = sorted(set(ids_BT[~keep_BT].tolist()))
    job = {"model": str(EMBEDDED), "ids": str(room / "ids.safetensors"), "batch": 16, "special": special, "hook": hook}
    answers = [json.loads(line) for line in ask(python, "benchmarks.peer_scores", job | folders).splitlines()]
    theirs, of_dl = answers[: len(loaded)], answers[len(loaded) :]
    free_B = keep_BT.all(1)
    own = ours(store, site, loaded, text, keep_BT, ids_BT)
    free = ours(store, site, loaded, text, keep_BT[free_B], ids_BT[free_B])
    print(f"\n{'SAE':<24}{'contexts':<22}{'':<16}{'ours':>12}{'sae_lens':>12}{'apart':>11}")
    for n, name in enumerate(names):
        for told in (
            *beside(name, "without specials", free[n], theirs[n]["free"]),
            *beside(name, "all", own[n], theirs[n]["own"]),
        ):
            print(told, flush=True)
    print(APART)
    if at is not None:
        print()
        shifted = {"ours": own[-1], "saelens": theirs[-1]["own"]}
        for told in mistakes(loaded[at], x_ND, of_dl[-1]["own"], theirs[at]["free"], free[at], shifted):
            print(told)


if __name__ == "__main__":
    main()
