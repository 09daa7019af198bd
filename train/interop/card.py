"""The model card: what an exported SAE is, how good, of what, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.base.errors import UserError
from data.base.records import Json
from train.interop.foreign import Origin
from train.sae.base import SAE
from train.sae.io import load_config

_NAMES = {
    "l0": "L0",
    "nmse": "NMSE",
    "ev": "explained variance",
    "ce_increase": "CE increase (nats)",
    "recovered_zero": "CE recovered, zero ablation",
    "recovered_mean": "CE recovered, mean ablation",
    "kl": "KL from the model's own predictions (nats)",
}
_DIGITS = {"l0": 1}


def reported(report: Path, folder: Path, fingerprint: str) -> Json:
    """Find the row and site of `folder` in an evaluation's report.json; UserError where it has none."""
    try:
        sites = json.loads(report.read_text(encoding="utf-8"))["sites"]
    except FileNotFoundError:
        raise UserError(f"report={report} does not exist: name the report.json of an evaluation") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"report={report} is no evaluation's report.json: name one") from None
    for site in sites:
        for row in site["saes"]:
            if site["fingerprint"] == fingerprint and Path(row["folder"]).resolve() == folder.resolve():
                if row.get("form", "shipped") != "shipped":
                    raise UserError(
                        f"report={report} scores {folder} as form={row['form']}: name one with form=shipped"
                    )
                return {"site": site, "row": row}
    raise UserError(f"report={report} has no row of {folder}: evaluate it, or leave the report out")


def card(sae: SAE, origin: Origin, config: Mapping[str, Any], loading: str, found: Json | None) -> str:
    """Write the model card in Markdown. `sae`: as exported; `config`: of the folder it came from;
    `found`: what `reported` gave."""
    training = config.get("training", {})
    what = f"A sparse autoencoder of width {sae.width:,} over the {sae.d_in} entries of `{origin.hook}`"
    site = str(origin.site)
    if origin.target is not None:
        site = f"{origin.site} to {origin.target}"
        what = (
            f"A transcoder{' with a skip' if sae.W_skip is not None else ''} of width {sae.width:,}: from the "
            f"{sae.d_in} entries of `{origin.hook}` it predicts the {sae.d_out} of `{origin.hook_out}`"
        )
    lines = [
        f"# {origin.variant}, {sae.width:,} latents, {site} of {origin.model}",
        "",
        what
        + (f", trained on {training['tokens']:,} tokens" if "tokens" in training else "")
        + f". Its contexts had {origin.packing['context']} tokens, BOS: {origin.packing['bos']}.",
        "",
        "```python",
        loading,
        "```",
        "",
        _units(sae),
        "",
        *_figures(training, found),
        "",
        f"Activations: store `{origin.store}`, fingerprint `{origin.fingerprint}`. Settings: "
        f"`{json.dumps(origin.settings)}`.",
    ]
    return "\n".join(lines) + "\n"


def set_card(folders: Sequence[Path], origin: Origin, loading: str) -> str:
    """Write the model card of a set of transcoders; `folders`: in the order of the layers. `origin`: of the first."""
    target = origin.target
    assert target is not None
    lines = [
        f"# {len(folders)} transcoders, {origin.site.kind} to {target.kind} of {origin.model}",
        "",
        f"One for each layer from 0 on, in the model's own units, read from the model without weight processing. Their "
        f"contexts had {origin.packing['context']} tokens, BOS: {origin.packing['bos']}.",
        "",
        "```python",
        loading,
        "```",
        "",
        "| layer | L0 | NMSE |",
        "| --: | --: | --: |",
    ]
    for layer, folder in enumerate(folders):
        held_out = load_config(folder).get("training", {}).get("heldout") or {}
        cells = [
            format(held_out[name], digits) if name in held_out else "-"
            for name, digits in (("l0", ".1f"), ("nmse", ".4f"))
        ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    lines += ["", f"Activations: store `{origin.store}`, fingerprint `{origin.fingerprint}`."]
    return "\n".join(lines) + "\n"


def _units(sae: SAE) -> str:
    if sae.input_norm == "token":
        return "Each token is normalised on the way in (layer_norm), and x_hat is in the model's units again."
    return (
        "x, x_hat and f are in the model's own units (no normalisation is left to be applied), read from the model "
        "without weight processing (`from_pretrained_no_processing` in TransformerLens)."
    )


def _figures(training: Mapping[str, Any], found: Json | None) -> list[str]:
    if found is None:
        held_out = training.get("heldout")
        if not held_out:
            return ["Not evaluated."]
        heading = f"On {held_out['tokens']:,.0f} held-out tokens, in the inference form:"
        return [heading, "", *_table({"l0": (held_out["l0"], None), "nmse": (held_out["nmse"], None)})]
    site, metrics = found["site"], found["row"]["metrics"]
    heading = f"On {site['tokens']:,} held-out tokens in {site['sequences']:,} contexts, in the inference form:"
    return [heading, "", *_table({name: (metrics[name]["value"], metrics[name]["se"]) for name in _NAMES})]


def _table(figures: Mapping[str, tuple[float | None, float | None]]) -> list[str]:
    def shown(name: str, value: float | None, error: float | None) -> str:
        digits = _DIGITS.get(name, 4)
        if value is None:
            return "-"
        return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    return ["| metric | value |", "| :-- | --: |"] + [
        f"| {_NAMES[name]} | {shown(name, *pair)} |" for name, pair in figures.items()
    ]
