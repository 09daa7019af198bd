"""`python -m evaluate`: which SAEs, the store and site of each, the LM and the held-out text, then the scores."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data.base.errors import UserError
from data.base.location import Location, parse_location
from data.base.records import Json, diff_fields
from data.base.settings import whole
from data.base.sites import Site
from data.store.find import find_fingerprint
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import Store
from evaluate.feature_metrics import run as gao
from evaluate.feature_metrics.bases import Reader, neurons_before
from evaluate.feature_metrics.sample import FeatureText
from evaluate.pareto import baseline_of, compare, require_baseline
from evaluate.report import markdown as report
from evaluate.report import page
from evaluate.score import FORMS, SiteScore
from harvest import lm
from harvest.documents import source_from
from harvest.packing import PackedTokens, Packing, pack
from train.sae.io import WEIGHTS, load, load_config

COUNTS = {"tokens": 1, "bootstrap": 2, "seed": 0}  # the least each may be


@dataclass(frozen=True)
class SavedSAE:
    """A folder of a trained SAE and the record in it."""

    folder: Path
    config: Json


def find_saes(patterns: str | Sequence[str]) -> list[SavedSAE]:
    """Every SAE in or below the folders that match, in order of their path; UserError for a pattern without any."""
    folders: set[Path] = set()
    several = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    for pattern in map(str, patterns if several else [patterns]):
        # A folder's own name may hold brackets, so a name that exists is never read as a pattern.
        matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
        found = {file.parent for match in matches for file in Path(match).rglob(WEIGHTS)}
        if not found:
            raise UserError(
                f"saes={pattern} holds no trained SAE (no {WEIGHTS} in or below it): train one or mend the path"
            )
        folders |= found
    if not folders:
        raise UserError("saes is empty: name at least one folder, as in saes=outputs/train")
    return [SavedSAE(folder, load_config(folder)) for folder in sorted(folders)]


def group_by_store(saes: Iterable[SavedSAE], cache: Location) -> list[tuple[Store, dict[str, list[SavedSAE]]]]:
    """The SAEs of each store by site; UserError where the cache has no such store, or it lacks the site."""
    stores: dict[str, Store] = {}
    places: dict[str, dict[str, list[SavedSAE]]] = {}
    for sae in saes:
        fingerprint, site = sae.config.get("fingerprint"), sae.config.get("site")
        if not isinstance(fingerprint, str) or not isinstance(site, str):
            raise UserError(f"{sae.folder} does not say which store and site it was trained on: train it again")
        if fingerprint not in stores:
            stores[fingerprint] = find_fingerprint(cache, fingerprint)
        stores[fingerprint].stats(TRAIN, site)
        places.setdefault(fingerprint, {}).setdefault(site, []).append(sae)
    return [(stores[fingerprint], sites) for fingerprint, sites in places.items()]


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with their counts as whole numbers; UserError for what they cannot be."""
    counts = {name: whole(config, name, least) for name, least in COUNTS.items()}
    if config["lm_batch"] is not None:
        counts["lm_batch"] = whole(config, "lm_batch", 1)
    if config["form"] not in FORMS:
        raise UserError(f"form={config['form']} is unknown: choose one of {', '.join(FORMS)}")
    checked = {**config, **counts}
    gao.asked(checked)
    return checked


@dataclass(frozen=True)
class Text:
    """What the SAEs of a store are scored on, and the LM that reads it."""

    model: Any
    packed: PackedTokens
    tokenizer: Any


def pinned(store: Store) -> Json:
    """The settings a store was asked with, what was then new on the hub replaced by the commits it was made from."""
    settings, identity = store.manifest.settings, store.manifest.identity
    model, text = dict(settings["model"]), dict(settings["text"])
    if identity["model"].get("commit"):
        model["revision"] = identity["model"]["commit"]
    if "revision" in identity["text"]:
        text["revision"] = identity["text"]["revision"]
    return {**settings, "model": model, "text": text}


def open_text(store: Store, config: Mapping[str, Any]) -> Text:
    """The LM and the held-out contexts `store` was made from, both proved to be the same; cheap checks first."""
    settings, identity = pinned(store), store.manifest.identity
    model_cfg = {**settings["model"], "device": config["device"], "device_map": config["device_map"]}
    packing, source = Packing.of(settings["packing"]), source_from(settings["text"])
    if not packing.heldout:
        raise UserError(
            f"{store.path} was made with packing.heldout=0, so no text is held out: harvest with a share of it"
        )
    source.check()
    lm.check_model(model_cfg)
    now: Json = {"model": lm.identify(model_cfg), "text": source.identity()}
    tokenizer = lm.load_tokenizer(model_cfg)
    now["tokenizer"] = lm.tokenizer_hash(tokenizer)
    fields = diff_fields({name: identity[name] for name in now}, now)
    if fields:
        told = "; ".join(field.replace(" here,", " in the store,").replace(" asked", " now") for field in fields)
        raise UserError(f"{store.path} was made from something else ({told}): restore it, or harvest and train again")
    try:
        packed = pack(source, tokenizer, packing, HELDOUT, config["tokens"])
    except UserError as error:
        raise UserError(f"tokens={config['tokens']:,} cannot be scored: {error}") from None
    return Text(lm.load_model(model_cfg), packed, tokenizer)


def measured(store: Store, name: str, saes: Sequence[SavedSAE], text: Text, config: Mapping[str, Any]) -> SiteScore:
    """The sums of one site over the whole text. `columns(scores[i])` of what comes back are the per-context sums of
    `saes[i]`, those of `shared` (clean, zero, mean) included: paired, for all SAEs of the site read the same contexts.
    """
    from tqdm import tqdm

    from evaluate.splice import Splice

    contexts, keep = text.packed.contexts, text.packed.keep
    score = SiteScore(
        Splice(text.model, Site.parse(name)),
        [load(sae.folder) for sae in saes],
        torch.from_numpy(store.stats(TRAIN, name).mean),
        getattr(torch, store.layout.dtype),
        (len(contexts), contexts.shape[1]),
        config["form"],
    )
    size = config["lm_batch"] or store.manifest.identity["lm_batch"]
    device = next(text.model.parameters()).device
    label = f"evaluate {len(saes)} SAE{'s' * (len(saes) > 1)} at {name}"
    with tqdm(total=int(keep.sum()), unit="tok", unit_scale=True, desc=label, mininterval=1.0) as bar:
        for first in range(0, len(contexts), size):
            ids_BT = torch.from_numpy(contexts[first : first + size]).to(device, torch.int64)
            keep_BT = torch.from_numpy(keep[first : first + size]).to(device)
            score.batch(ids_BT, keep_BT, first)
            bar.update(int(keep_BT.sum()))
    return score


def score_site(store: Store, name: str, saes: Sequence[SavedSAE], text: Text, config: Mapping[str, Any]) -> Json:
    """One site's part of the report."""
    score = measured(store, name, saes, text, config)
    results = score.result(samples=config["bootstrap"], seed=config["seed"])
    rows = [describe(sae, result) for sae, result in zip(saes, results, strict=True)]
    baseline = baseline_of([sae.folder for sae in saes], config["baseline"])
    compare(rows, [score.columns(each) for each in score.scores], baseline, config["bootstrap"], config["seed"])
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["variant"], rows[i]["metrics"]["l0"]["value"], i))
    rows = [{"number": number, **rows[i]} for number, i in enumerate(order, 1)]
    wanted = gao.asked(config)
    features = {}
    if wanted is not None:
        named = {report.title(row): score.scores[i].sae for row, i in zip(rows, order, strict=True)}
        features = {"gao": gao.measure(held_by(store, score, text, config), named, score.mean_D, density(rows), wanted)}
    sequences, context = text.packed.contexts.shape
    return {
        "site": name,
        "store": store.path.name,
        "fingerprint": store.manifest.fingerprint,
        "model": store.manifest.name,
        "d_model": len(score.mean_D),
        "split": HELDOUT,
        "context": context,
        "sequences": sequences,
        "tokens": int(text.packed.keep.sum()),
        "excluded": int((~text.packed.keep).sum()),
        "predicted": int(score.shared["predicted"].sum()),
        "storage": {"dtype": store.layout.dtype, "nmse": score.storage_nmse()},
        "baseline": None if baseline is None else str(saes[baseline].folder),
        "saes": rows,
        **features,
    }


def held_by(store: Store, score: SiteScore, text: Text, config: Mapping[str, Any]) -> FeatureText:
    """The text of a site as the feature metrics read it."""
    site, ids = score.splice.site, torch.from_numpy(text.packed.contexts[:1]).long()
    model = score.splice.model
    neurons = neurons_before(model, site, ids.to(next(model.parameters()).device))
    bos = None if store.manifest.settings["packing"]["bos"] == "none" else text.tokenizer.bos_token_id
    size = config["lm_batch"] or store.manifest.identity["lm_batch"]
    return FeatureText(text.packed, text.tokenizer, Reader(model, site, neurons), size, bos)


def density(rows: Sequence[Json]) -> float:
    """The share of tokens on which a latent of these SAEs is active, on average."""
    return float(sum(row["metrics"]["l0"]["value"] / row["width"] for row in rows) / len(rows))


def describe(sae: SavedSAE, result: Json) -> Json:
    """A row of the report: what the SAE is, and what was measured."""
    settings = sae.config["settings"]
    return {
        "folder": str(sae.folder),
        "variant": sae.config["variant"],
        "width": settings["width"],
        "expansion": settings["width"] / settings["d_in"],
        "settings": settings,
        "training": sae.config.get("training", {}),
        **result,
    }


def evaluate(config: Mapping[str, Any]) -> Path:
    """Score what a resolved configuration names; the path of the report."""
    config = checked(config)
    saes = find_saes(config["saes"] or ())
    require_baseline([sae.folder for sae in saes], config["baseline"])
    page.check(config, [sae.folder for sae in saes])
    places = group_by_store(saes, parse_location(config["cache"]))
    for _, by_site in places:
        for rivals in by_site.values():
            baseline_of([sae.folder for sae in rivals], config["baseline"])
    sites = []
    for store, by_site in places:
        text = open_text(store, config)
        sites += [score_site(store, name, saes, text, config) for name, saes in by_site.items()]
    settings = {name: config[name] for name in ("tokens", "lm_batch", "bootstrap", "seed", "form")}
    found: Json = {"format": report.FORMAT, "settings": settings, "sites": sites}
    path = report.write(found, Path(config["out"]))
    print(f"page: {page.finish(found, config)}")
    return path


def main(config: DictConfig) -> None:
    """The stage, from Hydra's configuration."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    print(f"report: {evaluate({str(name): value for name, value in resolved.items()})}")
