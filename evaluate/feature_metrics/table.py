"""The feature metrics in the Markdown report."""

from __future__ import annotations

from collections.abc import Callable

from data.base.records import Json

FEATURE_DEFINITIONS = {
    "probe loss": "mean over {tasks} binary tasks of the cross-entropy (nats) of the best unit's 1-d logistic probe on"
    " its pre-activation (Gated: the gate's), the unit chosen on one half of the contexts and scored on the other;"
    " guessing by each task's base rate loses {base}. Lower is better.",
    "precision, recall": "of token patterns (endings of a context of at most 16 tokens, with wildcards) built from"
    " {examples} firing tokens of each of {units} sampled units on one half: on the other half, the share of the tokens"
    " foretold that fire, the share of the firing tokens foretold; means over the units that fire in both (tested).",
    "recall of activation": "recall with each firing token weighted by its activation; F1: of precision and recall.",
    "downstream fraction": "one active unit's part is taken from x at a random token: (||d||_1 / ||d||_2)^2 / (V T) of"
    " the logit differences d at that and the next 16 tokens, less the median over V at each. Lower is sparser.",
    "baselines": "units active on {density:.2%} of the tokens, as the SAEs' latents on average: channels, random"
    " directions and principal components of x less the training mean, and the neurons of the last MLP before x.",
}


def shown(entry: Json, digits: int) -> str:
    """Write `value [low, high]`."""
    if entry["value"] is None:
        return "–"
    text = f"{entry['value']:.{digits}f}"
    return text if entry["low"] is None else f"{text} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


COLUMNS: dict[str, tuple[str, Callable[[Json], str]]] = {
    "probe loss": ("probe", lambda m: shown(m["loss"], 4)),
    "precision": ("patterns", lambda m: shown(m["precision"], 3)),
    "recall": ("patterns", lambda m: shown(m["recall"], 3)),
    "recall of activation": ("patterns", lambda m: shown(m["recall_activation"], 3)),
    "F1": ("patterns", lambda m: shown(m["f1"], 3)),
    "tested": ("patterns", lambda m: f"{m['tested']} of {m['units']}"),
    "downstream fraction": ("ablation", lambda m: shown(m["fraction"], 4)),
    "ablations": ("ablation", lambda m: f"{m['ablations']:,}"),
}


def feature_section(measured: Json, table: Callable[[list[str], list[list[str]]], str]) -> list[str]:
    """Write a heading, the table of all bases and what its columns mean."""
    bases = measured["bases"]
    columns = {name: (metric, cell) for name, (metric, cell) in COLUMNS.items() if metric in bases[0]}
    cells = [[row["name"], f"{row['width']:,}", *(cell(row[m]) for m, cell in columns.values())] for row in bases]
    probed = bases[0].get("probe", {"tasks": {}, "loss_base_rate": 0.0})
    known = {"tasks": len(probed["tasks"]), "base": f"{probed['loss_base_rate']:.4f}", **measured["settings"]}
    used = [name for name in FEATURE_DEFINITIONS if name == "baselines" or any(c in columns for c in name.split(", "))]
    words = [f"- **{name}**: {FEATURE_DEFINITIONS[name].format(**known)}" for name in used]
    if measured["left_out"]:
        words.append(f"- Tasks with too few tokens of one answer, left out: {', '.join(measured['left_out'])}.")
    return [
        "### Feature metrics (Gao et al. 2406.04093)\n\nIn brackets 95% intervals (bootstrap over documents; over units"
        " for the patterns).",
        table(["basis", "units", *columns], cells),
        "\n".join(words),
    ]
