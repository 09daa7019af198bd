"""`report.html`: the whole report as one page that needs nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.base.errors import UserError
from data.base.location import parse_location
from data.store.find import find_fingerprint
from evaluate.report.markdown import DEFINITIONS
from evaluate.report.render import asset, digest, render, replace
from evaluate.report.tables import Table, cell, heading, is_plain, sae_name, sae_tables, site_tables

Json = dict[str, Any]

BEST = "best"

# Of a site: what the page tells in its own words.
TOLD = {"site", "model", "store", "fingerprint", "saes", "plots", "d_model", "split", "storage"}


def check(config: Mapping[str, Any], folders: Sequence[Path]) -> None:
    """UserError where `features` names none of the SAEs to be scored."""
    if config["features"] not in (None, BEST, *(folder.name for folder in folders)):
        names = ", ".join(dict.fromkeys(folder.name for folder in folders))
        raise UserError(f"features={config['features']} is none of the SAEs: choose {BEST}, null or one of {names}")


def chosen(report: Json, name: str) -> str:
    """The folder of the SAE of that name, the first in the report; the best is the one of least CE increase."""
    rows: list[Json] = [row for site in report["sites"] for row in site["saes"]]
    if name != BEST:
        return next(str(row["folder"]) for row in rows if Path(row["folder"]).name == name)
    costs = [row["metrics"]["ce_increase"]["value"] for row in rows]
    known = [(cost, number) for number, cost in enumerate(costs) if cost is not None]
    return str(rows[min(known)[1] if known else 0]["folder"])


def finish(report: Json, config: Mapping[str, Any]) -> Path:
    """The feature pages of the SAE that `features` names, where it names one, then `report.html`; its path."""
    made: dict[str, Path] = {}
    if config["features"] is not None:
        from evaluate.features.run import make_for

        folder = chosen(report, config["features"])
        made[folder] = make_for(config, folder)
    return write(report, config, made)


def write(report: Json, config: Mapping[str, Any], features: Mapping[str, Path]) -> Path:
    """Write `report.html` into the folder of the report; its path.

    `config` as resolved, told whole; `features`: the feature pages that were made, by the folder of their SAE.
    """
    from plotly.offline import get_plotlyjs

    out = Path(config["out"])
    plotly, script = get_plotlyjs(), asset("report.js")
    page = render(
        "report.html",
        sites=[section(site, config, features) for site in report["sites"]],
        definitions=DEFINITIONS,
        settings=report["settings"],
        config=OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        style=asset("base.css") + asset("report.css"),
        plotly=type(script)(plotly),
        script=script,
        digests=f"{digest(plotly)} {digest(script)}",
    )
    replace(out / "report.html", page)
    return out / "report.html"


def section(site: Json, config: Mapping[str, Any], features: Mapping[str, Path]) -> Json:
    """What the page tells of one site."""
    from evaluate.report import figures

    rows: list[Json] = site["saes"]
    made = {
        "NMSE against L0": figures.against_l0(rows, "nmse", "NMSE"),
        "CE increase against L0": figures.against_l0(rows, "ce_increase", "CE increase (nats)"),
        "Active latents of a token": figures.l0_histogram(rows),
        "Densities of the latents": figures.density_histogram(rows, site["tokens"]),
    }
    store = find_fingerprint(parse_location(config["cache"]), site["fingerprint"])
    facts = {name: value for name, value in site.items() if name not in TOLD and is_plain(value) and value is not None}
    tables: list[Table] = [*sae_tables(rows), *site_tables(site, TOLD)]
    return {
        "title": f"{site['site']} of {site['model']}",
        "model": site["model"],
        "site": site,
        "facts": {heading(name): cell(value).text for name, value in facts.items()},
        "tables": tables,
        "figures": [(title, figure) for title, figure in made.items() if figure],
        "curves": figures.training_curves(rows),
        "identity": store.manifest.identity,
        "site_ce": {
            name: cell(rows[0]["metrics"][f"ce_{name}"])
            for name in ("clean", "zero", "mean")
            if f"ce_{name}" in rows[0]["metrics"]
        },
        "saes": [
            {"name": sae_name(row), "settings": {"settings": row["settings"], "training": row["training"]}}
            for row in rows
        ],
        "features": [
            (sae_name(row), Path(os.path.relpath(features[row["folder"]], config["out"])).as_posix())
            for row in rows
            if row["folder"] in features
        ],
    }
