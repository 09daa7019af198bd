"""`report.html`: the whole report as one page that needs nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.base.files import write_atomic
from data.base.records import Json
from evaluate.report.columns import DEFINITIONS, OF_SITE, STAR, best_at_their_l0, few_documents, massive_rows, sae_name
from evaluate.report.render import asset, render, script_hash
from evaluate.report.tables import Table, cell, heading, is_plain, sae_tables, site_tables, together_table
from evaluate.report.together import together_sentences, together_title
from evaluate.report.verdict import verdict_sentences

# Of a site: what the page says in its own words.
IN_WORDS = {
    "site",
    "model",
    "store",
    "fingerprint",
    "saes",
    "plots",
    "d_model",
    "split",
    "storage",
    "massive",
    "verdict",
}


def write_page(
    report: Json, config: Mapping[str, Any], identities: Mapping[str, Json], features: Mapping[str, Path]
) -> Path:
    """Write `report.html` into the folder of the report; its path.

    `config`: as resolved, shown whole. `identities`: that of each store, by fingerprint. `features`: the feature pages
    that were made, by the folder of their SAE.
    """
    from plotly.offline import get_plotlyjs

    out = Path(config["out"])
    plotly, script = get_plotlyjs(), asset("report.js")
    page = render(
        "report.html",
        sites=[site_section(site, config, identities[site["fingerprint"]], features) for site in report["sites"]],
        together=[together_section(report, one) for one in report.get("together", [])],
        made=report.get("made", "")[:16].replace("T", " "),
        star=STAR,
        definitions=DEFINITIONS,
        settings=report["settings"],
        config=OmegaConf.to_yaml(OmegaConf.create(dict(config))),
        style=asset("base.css") + asset("report.css"),
        plotly=type(script)(plotly),
        script=script,
        digests=f"{script_hash(plotly)} {script_hash(script)}",
    )
    write_atomic(out / "report.html", page)
    return out / "report.html"


def site_section(site: Json, config: Mapping[str, Any], identity: Json, features: Mapping[str, Path]) -> Json:
    """Gather what the page shows of one site."""
    from evaluate.report import figures

    rows: list[Json] = site["saes"]
    made = {
        "NMSE against L0": figures.figure_against_l0(rows, "nmse", "NMSE"),
        "CE increase against L0": figures.figure_against_l0(rows, "ce_increase", "CE increase (nats)"),
        "Active latents of a token": figures.l0_figure(rows),
        "Densities of the latents": figures.density_histogram(rows, site["tokens"]),
    }
    facts = {
        name: value for name, value in site.items() if name not in IN_WORDS and is_plain(value) and value is not None
    }
    tables: list[Table] = [*sae_tables(rows, best_at_their_l0(site)), *site_tables(site, IN_WORDS)]
    return {
        "title": f"{site['site']} of {site['model']}",
        "model": site["model"],
        "site": site,
        "facts": {heading(name): cell(value).text for name, value in facts.items()},
        "verdict": verdict_sentences(site),
        "tables": tables,
        "warnings": [sentence for sentence in (few_documents(site), *massive_rows(site)) if sentence],
        "figures": [(title, figure) for title, figure in made.items() if figure],
        "curves": figures.training_curves(rows),
        "identity": identity,
        "site_ce": {
            column.heading: cell(rows[0]["metrics"][column.key])
            for column in OF_SITE
            if column.key in rows[0]["metrics"]
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


def together_section(report: Json, together: Json) -> Json:
    """Gather what the page shows of a replacement model."""
    return {
        "title": together_title(together),
        "sentences": together_sentences(report, together),
        "table": together_table(report, together),
    }
