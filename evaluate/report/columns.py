"""The columns of a report, each stated once: where its value is, its heading, its decimals and what it means.

The renderers (markdown, tables and page) read this list; a metric that it does not name still stands on the page,
under its own key. To add a metric: evaluate/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from data.base.records import Json

REPORT_FORMAT = 1  # of report.json
SHIPPED, BATCH = "shipped", "batch"  # the forms of an SAE in report.json
Better = Literal["lower", "higher", ""]
ARROWS = {"lower": "↓", "higher": "↑"}
STAR = "★"  # marks the best SAE at its L0
FEW_DOCUMENTS = 50  # below so many documents an interval says that it may be too narrow


@dataclass(frozen=True)
class Column:
    """One column of a table of SAEs.

    key: its name in report.json. read: its value in an SAE's row of the report: a number, a text, None for what is not
    known, or a statistic with its standard error. digits: decimals where there is no standard error to say how many.
    definition: what the legend says. better: whether a lower or a higher value is better; empty for neither.
    """

    key: str
    heading: str
    digits: int
    definition: str
    read: Callable[[Json], Any]
    better: Better = ""

    @property
    def titled(self) -> str:
        """Return the heading with an arrow to the better values."""
        return f"{self.heading} {ARROWS[self.better]}" if self.better else self.heading


def metric(key: str, heading: str, digits: int, definition: str = "", better: Better = "") -> Column:
    """Return a statistic of `row["metrics"]`."""
    return Column(key, heading, digits, definition, lambda row: row["metrics"][key], better)


def _dead(row: Json) -> str | None:
    dead, window = row["training"].get("dead"), row["training"].get("dead_after")
    if dead is None:
        return None
    return f"{dead:,} (in {window:,})" if window else f"{dead:,}"


def sparsity_setting(settings: Json) -> str:
    """Return how sparse an SAE was set to be, by the settings that say so."""
    known = ((name, settings.get(name)) for name in ("k", "target_l0", "sparsity"))
    return ", ".join(f"{name}={value:g}" for name, value in known if value is not None)


def sae_name(row: Json) -> str:
    """Return what an SAE is called in the report: its number, its variant, and its form where that is not its own."""
    form = row.get("form", SHIPPED)
    return f"{row['number']} {row['variant']}" + ("" if form == SHIPPED else f" ({form} form)")


def best_at_their_l0(site: Json) -> set[str]:
    """Return the folders of the SAEs that have the lowest CE increase of all that share their L0."""
    return {group["best"] for group in site.get("verdict", []) if group["next"] is not None}


def pareto_names(row: Json) -> str | None:
    """Return the costs in which no other SAE of the table is better at its L0."""
    names = {"nmse": "NMSE", "ce_increase": "CE"}
    return ", ".join(names[cost] for cost in row["pareto"]) or None


_CE = "next-token cross-entropy in nats over the predicted tokens, with x̂ in place of x at every kept token."
_PARETO = "the costs (NMSE, CE) in which no other SAE of the table is at most as large at an L0 at most as large."
_DEAD = "latents that fired on none of the last training tokens (how many: in brackets), as training recorded."

SPLICE = (
    metric("l0", "L0", 2, "mean number of latents above 0 on a held-out token."),
    metric(
        "nmse",
        "NMSE",
        4,
        "sum ||x - x̂||² / sum ||x - mean x||² over the set, in the model's units (FVU).",
        "lower",
    ),
    metric("ce_spliced", "CE", 4, _CE, "lower"),
    metric("ce_increase", "CE increase", 4, "CE spliced - CE clean.", "lower"),
    metric(
        "recovered_zero",
        "recovered zero",
        4,
        "(CE zero - CE spliced) / (CE zero - CE clean), of pooled means.",
        "higher",
    ),
    metric("recovered_mean", "recovered mean", 4, "the same against the training mean in place of x.", "higher"),
    metric(
        "kl",
        "KL",
        4,
        "KL(clean || spliced) of the next-token distributions, in nats, mean over the predicted tokens.",
        "lower",
    ),
)
PARETO = Column("pareto", "Pareto", 0, _PARETO, pareto_names)
EQUAL_L0 = Column(
    "at_equal_l0",
    "CE at equal L0",
    3,
    "CE increase over what the line through the site's SAEs (log CE increase against log L0) has at the SAE's own L0,"
    " less 1, with its 95% interval (bootstrap over documents): below 0 is better than the sweep as a whole.",
    lambda row: row.get("at_equal_l0"),
    "lower",
)
"""Where the L0 of a site's SAEs differ, so that their CE alone ranks nothing."""
DETAIL = (
    metric("ev", "EV", 4, "explained variance, 1 - NMSE.", "higher"),
    metric(
        "nmse_token",
        "NMSE token",
        4,
        "NMSE with each token's entries brought to mean 0 and standard deviation 1, x̂ by x's map.",
        "lower",
    ),
    metric(
        "nmse_btk",
        "NMSE btk",
        4,
        "mean squared error over tokens and entries in that space, not divided by a variance.",
        "lower",
    ),
    metric("cosine", "cosine", 4, "mean cosine of x and x̂.", "higher"),
    metric(
        "gamma",
        "gamma",
        4,
        "E||x̂||² / E[x̂·x]: 1 is unbiased, below 1 shrinks.",
    ),
    metric("gamma_c", "gamma c", 4, "gamma after b_dec is taken from x̂ and x."),
    Column("std", "L0 sd", 2, "standard deviation of L0 over tokens.", lambda row: row["l0"]["std"]),
    Column(
        "silent",
        "silent",
        0,
        "latents that fire on none of the held-out tokens scored.",
        lambda row: row["l0"]["silent"],
        "lower",
    ),
    Column("dead", "dead", 0, _DEAD, _dead, "lower"),
    Column(
        "storage_share",
        "storage share",
        4,
        "NMSE of rounding x to the store's dtype, divided by the SAE's NMSE.",
        lambda row: row["storage_share"],
    ),
)
SIZES = (
    Column("asked", "asked", 0, "how sparse the SAE was asked to be.", lambda row: sparsity_setting(row["settings"])),
    Column("width", "latents F", 0, "", lambda row: row["width"]),
    Column("expansion", "expansion", 0, "latents / entries that are read.", lambda row: f"{row['expansion']:g}"),
    Column("tokens", "training tokens", 0, "", lambda row: row["training"].get("tokens")),
    Column("seed", "seed", 0, "", lambda row: row["training"].get("seed")),
    Column("folder", "folder", 0, "", lambda row: f"`{row['folder']}`"),
)
OF_SITE = (
    metric("ce_clean", "CE clean", 4, "CE of the model as it is."),
    metric("ce_zero", "CE zero", 4, "CE with 0 in place of x at every kept token."),
    metric("ce_mean", "CE mean", 4, "CE with the training mean in place of x at every kept token."),
)
"""The same for all SAEs of a site, so shown once."""

DELTAS = ("l0", "nmse", "ce_increase", "recovered_zero", "kl")
"""The statistics whose difference from a baseline the Markdown shows."""
ALL_ROWS = ("nmse", "ev", "l0", "cosine", "gamma")
"""The statistics that are shown over all rows too, where massive ones are among them."""

BY_KEY = {column.key: column for column in (*SPLICE, *DETAIL, *OF_SITE)}


def _definitions() -> dict[str, str]:
    """Return the legend in the order in which it is read."""
    defined = {column.heading: column.definition for column in (*SPLICE, *DETAIL, *OF_SITE) if column.definition}
    named = {
        "SAE": "variant; the number is that of the row which names the folder.",
        STAR: "the lowest CE increase of the SAEs whose L0 are within 5% of each other.",
        "↓, ↑": "lower, or higher, is better.",
    }
    order = ("L0", "L0 sd", "NMSE", "EV", "NMSE token", "NMSE btk", "cosine", "gamma", "gamma c")
    losses = ("CE", "CE increase", "CE clean", "CE zero", "CE mean", "recovered zero", "recovered mean", "KL")
    named |= {heading: defined[heading] for heading in (*order, *losses)}
    named |= {
        "Pareto": PARETO.definition,
        EQUAL_L0.heading: EQUAL_L0.definition,
        "Δ": "difference from the baseline on the same text, with its 95% interval (paired bootstrap over documents),"
        " in bold where the interval leaves 0 out.",
    }
    named |= {heading: defined[heading] for heading in ("silent", "dead", "storage share")}
    return named | {"±": "one standard error, paired bootstrap over documents."}


DEFINITIONS = _definitions()


def few_documents(site: Json) -> str | None:
    """Return a sentence where a site's intervals draw from few documents."""
    count = site.get("documents")
    if count is None or count >= FEW_DOCUMENTS:
        return None
    return (
        f"Standard errors and intervals draw only {count:,} document{'s' * (count != 1)}: below {FEW_DOCUMENTS} they"
        " may be too small, so score more documents before relying on them."
    )


def massive_rows(site: Json) -> list[str]:
    """Return the sentences about the rows of a site whose norm is massive; none where there are none."""
    massive = site.get("massive")
    if massive is None:
        return []
    rule = f"a norm above {massive['times']:g} times the median {massive['median']:.4g}"
    if "sites" in massive:
        each = massive["sites"].items()
        rule = " or ".join(
            f"at {site} one above {by['times']:g} times the median {by['median']:.4g}" for site, by in each
        )
    sentences = []
    if massive["left_out"]:
        sentences.append(
            f"{massive['left_out']:,} massive rows ({rule}: the SAEs' own rule) are treated like special tokens:"
            " neither fed, nor replaced, nor scored."
        )
    if massive["rows"]:
        sentences.append(
            f"{massive['rows']:,} of the rows are massive ({rule}): reconstruction and L0 are given over the ordinary"
            " rows first and over all rows beside them; the losses are of the splice of all rows."
        )
    return sentences + ([massive["note"]] if massive["note"] else [])
