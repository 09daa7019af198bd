"""`python -m benchmarks.claims`: the SAEs that `make claims` trained, scored once, then a verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from data.base.errors import UserError
from data.base.location import parse_location
from data.base.records import Json, canonical
from data.base.settings import number, whole
from evaluate.inputs import SavedSAE, find_saes, group_by_store

if TYPE_CHECKING:
    from benchmarks.claims.scores import Asked, Place

WIDEST_RESCALED = 8192  # latents; the fit holds a few matrices of twice that, squared, in float64

COUNTS = {"tokens": 1, "bootstrap": 2, "seed": 0, "batch": 1, "calibration_tokens": 1}  # the least each may be


def judge(config: Mapping[str, Any]) -> Path:
    """Score what a resolved configuration names and judge the claims on it; the path of the report."""
    config = settled(config)
    found = [(store, site, saes) for store, sites in _stores(config) for site, saes in sites.items()]
    special = [bool(store.manifest.settings["packing"]["keep_special"]) for store, _, _ in found]
    for kept in set(special):
        if special.count(kept) > 1:
            raise UserError(
                f"saes={config['saes']} holds SAEs of several sites or stores whose rows are "
                f"{'with' if kept else 'without'} special tokens: name the folder of one model's claims"
            )
    if False not in special:
        raise UserError(f"saes={config['saes']} holds no SAE of rows without special tokens: train the grid first")
    from benchmarks.claims import gated_jumprelu as rivals
    from benchmarks.claims import report, scaling, topk
    from benchmarks.claims.bench import Bench
    from benchmarks.claims.scores import Asked, Place

    out = Path(config["out"])
    places = {kept: Place(store, site, config) for kept, (store, site, _) in zip(special, found, strict=True)}
    trained = {kept: saes for kept, (_, _, saes) in zip(special, found, strict=True)}
    asked = {False: wanted(trained[False], config), True: [Asked(sae) for sae in trained.get(True, [])]}
    scored = {kept: place.score(asked[kept], out / "scores") for kept, place in places.items()}
    bench = Bench(scored[False], scored.get(True, []), config)
    by_folder = {sae.folder: sae for sae in trained[False]}
    parts = topk.claims(bench)
    parts += rivals.claims(bench, lambda sae: places[False].batches(by_folder[sae.folder])[0])
    parts += scaling.claims(bench)
    return report.write(bench, parts, _told(places[False], bench.main[0].firing), out)


def _stores(config: Mapping[str, Any]) -> list[Any]:
    return group_by_store(find_saes(config["saes"] or ()), parse_location(config["cache"]))


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with their counts as whole numbers; UserError for what they cannot be."""
    counts = {name: whole(config, name, least) for name, least in COUNTS.items()}
    number(config, "expansion", 0, math.inf)
    if config["lm_batch"] is not None:
        counts["lm_batch"] = whole(config, "lm_batch", 1)
    return {**config, **counts}


def wanted(saes: Sequence[SavedSAE], config: Mapping[str, Any]) -> list[Asked]:
    """Every SAE in the form that ships, those of the fixed width in the other forms that a claim compares.

    Of SAEs that two sweeps have in common one is taken.
    """
    from benchmarks.claims.bench import BASELINE
    from benchmarks.claims.scores import BATCH, PER_TOKEN, RESCALED, SHIPPED, THRESHOLD, Asked, options

    forms = {"batchtopk": (BATCH, PER_TOKEN), "topk": (THRESHOLD,), "relu": (RESCALED,)}
    found, seen = [], set()
    for sae in saes:
        training = {name: sae.config["training"][name] for name in ("tokens", "batch", "seed")}
        told = canonical([sae.config["variant"], sae.config["settings"], training])
        if told in seen:
            continue
        seen.add(told)
        variant, settings = sae.config["variant"], sae.config["settings"]
        fixed = settings["width"] == config["expansion"] * settings["d_in"]
        plain = options(sae.config) == (BASELINE if variant == "relu" else {})
        more = forms.get(variant, ()) if fixed and plain and training["batch"] == config["batch"] else ()
        if settings["width"] > WIDEST_RESCALED:
            more = tuple(form for form in more if form != RESCALED)
        found += [Asked(sae, form) for form in (SHIPPED, *more)]
    return found


def _told(place: Place, firing: Json) -> Json:
    """What the report says of the site and the tokens."""
    manifest = place.store.manifest
    sizes = {name: firing[name] for name in ("heldout_tokens", "sequences", "context", "d_model")}
    return {"model": manifest.name, "site": place.site, "fingerprint": manifest.fingerprint, **sizes}


def main(config: DictConfig) -> None:
    """The stage, from Hydra's configuration."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    print(f"report: {judge({str(name): value for name, value in resolved.items()})}")
