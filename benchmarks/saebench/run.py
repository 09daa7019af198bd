"""SAEBench's metrics of trained SAEs beside ours: exports them, runs SAEBench in its environment, writes a table.

`core` reads what our own evaluation reads: the held-out contexts of the SAEs' store, through the same language model.
Both sides leave out the same special tokens, by their ids, and no other row.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from omegaconf import DictConfig
from pydantic import BeforeValidator, Field
from safetensors.torch import save_file
from torch import Tensor

from data.base.cli import stage_settings
from data.base.config import Text, Whole
from data.base.errors import UserError
from data.base.files import write_atomic
from data.base.location import parse_location
from data.base.logs import doing
from data.base.records import Json
from data.base.sites import Site
from data.store.store import Store
from evaluate.config import HeldoutTextSettings, Names
from evaluate.inputs import HeldoutText, SavedSAE, find_saes, group_by_store, open_text, pinned
from evaluate.metrics import statistics, totals
from evaluate.score import SiteScore
from evaluate.splice import Splice
from harvest import hub
from harvest.hooks import run_to
from harvest.lm import LanguageModel, torch_device
from harvest.model_files import has_tokenizer
from train.interop.export import export
from train.sae import SAE, load

ROOT = Path(__file__).resolve().parents[2]
Eval = Literal["core", "core_openwebtext", "sparse_probing", "absorption", "scr", "tpp"]
CORE: Eval = "core"

# What a table's rows are called, our name of each figure and SAEBench's, and its decimals.
ROWS = (
    ("L0", "l0", "l0", 2),
    ("explained variance", "ev", "explained_variance", 4),
    ("the same by SAEBench's formula", "ev_theirs", "explained_variance", 4),
    ("cosine", "cosine", "cossim", 4),
    ("CE", "ce_clean", "ce_loss_without_sae", 4),
    ("CE, spliced", "ce_spliced", "ce_loss_with_sae", 4),
    ("CE, zero ablation", "ce_zero", "ce_loss_with_ablation", 4),
    ("CE loss score (recovered, zero)", "recovered_zero", "ce_loss_score", 4),
    ("KL to the untouched model", "kl", "kl_div_with_sae", 4),
)
NOTES = """Where the definitions differ:

- Explained variance: ours is 1 - E||x - x_hat||^2 / E||x - E x||^2. SAEBench 0.6.0 divides by E||x||^2 - m^2, m the
  mean of x^2 over tokens and dimensions, where a variance has the squared norm of the mean. The second row is its
  formula on our x and x_hat.
- Cross-entropy: SAEBench's zero ablation zeroes special tokens too, and it scores what follows each token that is not
  special. Ours leaves special tokens as they are in every run and scores the prediction of each token that is not one.
- KL: SAEBench also counts the last position of each context; ours the positions that predict a token of the set.
- L0 and cosine are defined alike.
- Rows of massive norm, which `python -m evaluate` leaves out or tells apart, are in both columns."""


class SAEBenchSettings(HeldoutTextSettings):
    """The settings of conf/saebench.yaml."""

    saes: Names
    """Folders or globs; every SAE in or below them is evaluated."""
    evals: Annotated[list[Eval], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = Field(
        default_factory=lambda: [CORE], min_length=1
    )
    """SAEBench's evaluations; all but core take data and model from the hub."""
    environment: Text = ".venv-saebench"
    """The environment that SAEBench is installed in."""
    seed: Whole = Field(42, ge=0)
    """The seed of SAEBench's evaluations other than core; its authors' own."""


@dataclass(frozen=True)
class Group:
    """SAEs of one site and store, and the model that they read."""

    store: Store
    site: str
    saes: list[SavedSAE]
    model: LanguageModel

    def refuse(self) -> None:
        """Raise UserError for what SAEBench has no form for."""
        for sae in self.saes:
            if sae.transcodes:
                raise UserError(f"{sae.folder} is a transcoder, and SAEBench evaluates autoencoders: leave it out")
        if Site.parse(self.site).path is not None:
            raise UserError(
                f"{self.site} is a module's path, and SAEBench reads sites by TransformerLens' names: leave out "
                f"{self.saes[0].folder}"
            )
        if self.model.is_gguf:
            raise UserError(f"{self.model.name} is a GGUF file, which SAEBench does not read: leave out its SAEs")
        if self.model.path is not None and not has_tokenizer(self.model.folder):
            raise UserError(f"{self.model.name} has no tokenizer, which SAEBench asks for: leave out its SAEs")


def python_of(environment: str) -> Path:
    """Find the interpreter of SAEBench's environment; UserError where it is not there."""
    python = Path(environment) / "bin" / "python"
    if not python.exists():
        raise UserError(f"environment={environment} has no SAEBench: make it with `make saebench`")
    return python


def ask_the_hub(
    groups: Sequence[Group], evals: Sequence[str], ask: Callable[[str, str | None], object] = hub.ask
) -> None:
    """Raise UserError where evaluations other than core cannot have what they take from the hub."""
    others = [name for name in evals if name != "core"]
    for group in groups if others else []:
        advice = f"evals={others[0]} takes its data and the model from the hub; evals=core needs neither"
        if group.model.path is not None:
            raise UserError(f"{group.model.name} is a local model: {advice}")
        try:
            ask(group.model.name, None)
        except UserError as error:
            raise UserError(f"{advice} ({error})") from None


def run_inside(python: Path, job: Json, room: Path, offline: bool) -> None:
    """Do a job in SAEBench's environment, which says what it does as it goes; UserError where it fails."""
    path = room / "job.json"
    path.write_text(json.dumps(job))
    environment = {**os.environ, "WANDB_MODE": "disabled", **({"HF_HUB_OFFLINE": "1"} if offline else {})}
    # From the checkout, so that the module is found; its output is no part of our table.
    command = [str(python.absolute()), "-W", "ignore", "-m", "benchmarks.saebench.inside", str(path)]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise UserError(f"SAEBench failed in {python}: its own message is above")


@dataclass(frozen=True)
class CoreContexts:
    """Whole batches of held-out contexts; keep_BT: the tokens that count; special: the ids of those that do not."""

    ids_BT: Tensor
    keep_BT: Tensor
    special: list[int]
    batch: int


def core_contexts(text: HeldoutText) -> CoreContexts:
    """Take the held-out contexts that fill whole batches, which SAEBench reads."""
    ids_BT, keep_BT = torch.from_numpy(text.packed.contexts).long(), torch.from_numpy(text.packed.keep)
    # SAEBench leaves tokens out by their ids, so both sides do.
    special = sorted(set(ids_BT[~keep_BT].tolist()))
    batch = min(text.lm_batch, len(ids_BT))
    ids_BT = ids_BT[: len(ids_BT) // batch * batch].contiguous()
    keep_BT = ~torch.isin(ids_BT, torch.tensor(special, dtype=torch.int64))
    return CoreContexts(ids_BT, keep_BT, special, batch)


@torch.inference_mode()
def variance_by_their_formula(text: HeldoutText, site: str, saes: Sequence[SAE], contexts: CoreContexts) -> list[float]:
    """Compute SAEBench's explained variance from our x and x_hat: means of batches, averaged over the batches."""
    squares: list[Tensor] = []
    moments: list[Tensor] = []
    errors: list[list[Tensor]] = [[] for _ in saes]
    batches = zip(
        torch.split(contexts.ids_BT, contexts.batch), torch.split(contexts.keep_BT, contexts.batch), strict=True
    )
    for ids_BT, keep_BT in batches:
        x_BTD = run_to(text.model, [Site.parse(site)], ids_BT.to(text.device))[site]
        x_ND = x_BTD[keep_BT.to(x_BTD.device)].float()
        squares.append(x_ND.square().sum(1).mean())
        moments.append(x_ND.square().mean())
        for error, sae in zip(errors, saes, strict=True):
            _, x_hat_ND = sae.to(x_ND.device).encode_decode(x_ND)
            error.append((x_ND - x_hat_ND).square().sum(1).mean())
    variance = torch.stack(squares).mean() - torch.stack(moments).mean() ** 2
    return [float(1 - torch.stack(error).mean() / variance) for error in errors]


def own_figures(group: Group, saes: Sequence[SAE], text: HeldoutText, contexts: CoreContexts) -> list[dict[str, float]]:
    """Score SAEs as `python -m evaluate` does, on these contexts."""
    ids_BT, keep_BT, batch = contexts.ids_BT, contexts.keep_BT, contexts.batch
    mean_D = torch.from_numpy(group.store.stats("train", group.site).mean)
    storage = getattr(torch, group.store.layout.dtype)
    shape = (ids_BT.shape[0], ids_BT.shape[1])
    score = SiteScore(Splice(text.model, Site.parse(group.site)), saes, mean_D, storage, shape)
    for first in range(0, len(ids_BT), batch):
        part = slice(first, first + batch)
        score.batch(ids_BT[part].to(text.device), keep_BT[part].to(text.device), first)
    sums = [statistics(totals(score.columns(one))) for one in score.scores]
    theirs = variance_by_their_formula(text, group.site, saes, contexts)
    return [
        {name: float(value[0]) for name, value in own.items()} | {"ev_theirs": value}
        for own, value in zip(sums, theirs, strict=True)
    ]


def compare(group: Group, names: Sequence[str], settings: SAEBenchSettings, python: Path) -> list[Json]:
    """Run the evaluations on a group; for core the figures of both sides, by SAE."""
    out = Path(settings.out).absolute()
    batch = settings.lm_batch or int(group.store.manifest.identity["lm_batch"])
    job: Json = {"evals": settings.evals, "seed": settings.seed, "batch": batch, "out": str(out)}
    job |= {"model_name": group.model.name, "dtype": group.model.compute_dtype}
    job["device"] = torch_device(settings.device)
    rows: list[Json] = []
    with tempfile.TemporaryDirectory() as place:
        room = Path(place)
        for sae, name in zip(group.saes, names, strict=True):
            export(sae.folder, "saelens", room / name)
        job |= {"saes": [{"name": name, "folder": str(room / name)} for name in names], "to": str(room / "core.json")}
        if "core" in settings.evals:
            saes = [load(sae.folder).eval() for sae in group.saes]
            text = open_text(group.store, settings.model_dump())
            contexts = core_contexts(text)
            doing(f"scoring {len(saes)} SAEs of {group.site} on {int(contexts.keep_BT.sum()):,} tokens")
            figures = own_figures(group, saes, text, contexts)
            rows = [
                {"sae": name, "folder": str(sae.folder), "site": group.site, "ours": own}
                for name, sae, own in zip(names, group.saes, figures, strict=True)
            ]
            save_file({"ids": contexts.ids_BT}, room / "ids.safetensors")
            job |= {"model": str(group.model.folder), "ids": str(room / "ids.safetensors")}
            job |= {"special": contexts.special, "batch": contexts.batch}
        doing(f"running SAEBench's {', '.join(settings.evals)} on {len(names)} SAEs of {group.site}")
        run_inside(python, job, room, offline=settings.evals == ["core"])
        theirs = json.loads(Path(job["to"]).read_text()) if rows else {}
    return [{**row, "saebench": theirs[row["sae"]]} for row in rows]


def table(rows: Sequence[Json]) -> str:
    """Write the figures of both sides in Markdown, a table an SAE, and where their definitions differ."""
    lines = []
    for row in rows:
        lines += [f"## {row['sae']} ({row['site']})", "", "| | ours | SAEBench | apart |", "| :-- | --: | --: | --: |"]
        for heading, own, theirs, digits in ROWS:
            pair = (row["ours"][own], row["saebench"][theirs])
            cells = [f"{value:.{digits}f}" for value in (*pair, pair[0] - pair[1])]
            lines.append(f"| {heading} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, NOTES, ""])


def run_saebench(config: Mapping[str, Any]) -> Path:
    """Evaluate the SAEs that a resolved configuration names; the folder of the results.

    Raises UserError, before anything is loaded, for what SAEBench cannot evaluate and for a hub out of reach.
    """
    settings = SAEBenchSettings.of(config)
    python = python_of(settings.environment)
    groups = [
        Group(store, site, saes, LanguageModel.of(pinned(store)["model"]))
        for store, by_site in group_by_store(find_saes(settings.saes), parse_location(settings.cache))
        for site, saes in by_site.items()
    ]
    for group in groups:
        group.refuse()
    ask_the_hub(groups, settings.evals)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Json] = []
    names = distinct_names([sae.folder for group in groups for sae in group.saes])
    for group in groups:
        own_names = [names[sae.folder] for sae in group.saes]
        rows += compare(group, own_names, settings, python)
    if rows:
        write_atomic(out / "core.json", json.dumps(rows, indent=1))
        write_atomic(out / "core.md", table(rows))
        print(table(rows))
    return out


def distinct_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Name each folder by its last part, with a number where several have that."""
    names: dict[Path, str] = {}
    for folder in folders:
        base, number = re.sub(r"[^\w.-]+", "-", folder.resolve().name, flags=re.ASCII), 2
        name = base
        while name in names.values():
            name, number = f"{base}-{number}", number + 1
        names[folder] = name
    return names


def main(config: DictConfig) -> None:
    """Run the comparison on Hydra's configuration."""
    print(f"SAEBench: {run_saebench(stage_settings(config, 'saebench'))}")
