"""Massive rows (attention sinks and the like): which they are, and what an evaluation does with them.

A row is massive where its norm is above `times` times the median norm of its site (methods: 10 times unless set). An
SAE that was trained without such rows says so in its config.json; they are then treated like special tokens, neither
fed nor replaced nor scored, for all SAEs of the site alike. Where no SAE has such a rule massive rows are scored, and
the report gives reconstruction over the ordinary rows first and over all rows beside it. The norm is that of the site
which is read; of a transcoder that of its input or of its target, as either may spoil its squared error. Where SAEs of
a target and transcoders into it stand side by side, a row that is massive at one of these sites is massive for all of
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.base.errors import UserError
from data.base.records import Json
from data.base.sites import Site
from data.store.massive import TIMES_MEDIAN
from evaluate.inputs import HeldoutText, SavedSAE
from harvest.hooks import run_to

MEDIAN_TOKENS = 8192  # held-out tokens at least that a site's median norm is taken over, where there are so many


@dataclass(frozen=True)
class MassiveRule:
    """Rows with a norm above `times` times `median`, the median norm of a site, are massive."""

    times: float
    median: float

    @property
    def limit(self) -> float:
        """Return the largest norm of an ordinary row."""
        return self.times * self.median

    def __str__(self) -> str:
        return f"norm above {self.times:g} times the median {self.median:.4g}"


def rules_of(sae: SavedSAE) -> dict[str, MassiveRule | None]:
    """Read the rules an SAE was trained by, by site: that of the site which it reads, None where it was trained on all
    rows, and of a transcoder that of its target, where it has one; UserError where the record is damaged."""
    rules = {sae.site: rule_of(sae)}
    # A transcoder of an earlier version looked at its input alone.
    if sae.transcodes and "target_median" in (sae.config.get("training", {}).get("outliers") or {}):
        rules[sae.target] = rule_of(sae, "target_median")
    return rules


def rule_of(sae: SavedSAE, median: str = "median") -> MassiveRule | None:
    """Read the rule of the site that an SAE reads, or with "target_median" that of a transcoder's target; None where it
    was trained on all rows; UserError where the record is damaged."""
    outliers = sae.config.get("training", {}).get("outliers")
    if outliers is None:
        return None
    try:
        rule = MassiveRule(float(outliers["times"]), float(outliers[median]))
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{sae.folder} has a record of outliers that cannot be read ({outliers}): train it again"
        ) from None
    if not 0 < rule.limit < float("inf"):
        raise UserError(f"{sae.folder} has a record of outliers that cannot be ({outliers}): train it again")
    return rule


def strictest(rules: Sequence[MassiveRule | None]) -> MassiveRule | None:
    """Choose the rule that leaves out most, by which all SAEs of a site are scored; None where none has one."""
    known = [rule for rule in rules if rule is not None]
    return min(known, key=lambda rule: rule.limit) if known else None


def disagreement(rules: Sequence[MassiveRule | None]) -> str | None:
    """Say in a sentence where the SAEs of a site were trained by different rules; None where they agree."""
    names = sorted({"no row" if rule is None else f"rows with a {rule}" for rule in rules})
    if len(names) < 2:
        return None
    return (
        f"The SAEs of this site were trained without different rows ({'; '.join(names)}):"
        f" all are scored without rows with a {strictest(rules)}."
    )


def norms_of(text: HeldoutText, site: Site, contexts: range) -> Float[np.ndarray, "n T"]:
    """Compute ||x|| at the site of every token of the contexts, by one forward as far as the site."""
    parts = []
    for batch in text.batches(contexts):
        x_BTD = run_to(text.model, [site], batch.ids_BT)[str(site)]
        parts.append(x_BTD.float().norm(dim=-1).cpu().numpy())
    return np.concatenate(parts)


def site_median_norm(text: HeldoutText, site: Site) -> float:
    """Compute the median ||x|| at the site over the first contexts that hold MEDIAN_TOKENS scored tokens."""
    # Scored tokens alone: special ones would drag a median over few contexts towards themselves.
    running = np.cumsum(text.packed.keep.sum(1))
    contexts = min(int(np.searchsorted(running, MEDIAN_TOKENS)) + 1, len(running))
    norms_ST = norms_of(text, site, range(contexts))
    return float(np.median(norms_ST[text.packed.keep[:contexts]]))


def without_massive(text: HeldoutText, rules: Mapping[str, MassiveRule]) -> tuple[HeldoutText, int]:
    """Mark the text's rows that are massive at one of the sites as not to be scored, like special tokens; how many."""
    contexts = range(len(text.packed.contexts))
    massive_ST = np.zeros(text.packed.keep.shape, bool)
    for site, rule in rules.items():
        massive_ST |= norms_of(text, Site.parse(site), contexts) > rule.limit
    left_out = int((massive_ST & text.packed.keep).sum())
    if left_out == text.packed.keep.sum():
        named = ", ".join(f"{site} has a {rule}" for site, rule in rules.items())
        raise UserError(f"every row of {named}, so nothing is left to score: train the SAEs again")
    packed = dataclasses.replace(text.packed, keep=text.packed.keep & ~massive_ST)
    return dataclasses.replace(text, packed=packed), left_out


@dataclass(frozen=True)
class ScoredText:
    """The text as all SAEs that stand side by side are scored on it.

    rules: what is massive, by site; by them `left_out` rows were taken out where `from_saes`, and rows
    are told apart in the report where not. note: a sentence where the SAEs' own rules differ.
    """

    text: HeldoutText
    rules: dict[str, MassiveRule]
    from_saes: bool
    left_out: int
    note: str | None

    @classmethod
    def of(cls, text: HeldoutText, saes: Sequence[SavedSAE]) -> ScoredText:
        """Apply the SAEs' own rules to the text; where none has one, find what is massive at the sites they are of."""
        own: dict[str, list[MassiveRule | None]] = {}
        for sae in saes:
            for site, rule in rules_of(sae).items():
                own.setdefault(site, []).append(rule)
        rules = {site: rule for site, of_site in own.items() if (rule := strictest(of_site)) is not None}
        if not rules:
            sites = dict.fromkeys(site for sae in saes for site in (sae.site, sae.target))
            found = {site: MassiveRule(TIMES_MEDIAN, site_median_norm(text, Site.parse(site))) for site in sites}
            return cls(text, found, False, 0, None)
        scored, left_out = without_massive(text, rules)
        notes = [note for of_site in own.values() if (note := disagreement(of_site)) is not None]
        return cls(scored, rules, True, left_out, " ".join(notes) or None)

    @property
    def limits(self) -> dict[str, float]:
        """Return the largest norm of an ordinary row, by site."""
        return {site: rule.limit for site, rule in self.rules.items()}

    def result(self, massive_rows: int) -> Json:
        """Return what report.json says of the rules; `massive_rows` were scored.

        times, median: of the first site; where several are read, "sites" has those of each.
        """
        of_sites = {site: {"times": rule.times, "median": rule.median} for site, rule in self.rules.items()}
        first = next(iter(of_sites.values()))
        return {
            **first,
            **({"sites": of_sites} if len(of_sites) > 1 else {}),
            "rows": massive_rows,
            "left_out": self.left_out,
            "by": "the SAEs' own rule" if self.from_saes else "the report's rule",
            "note": self.note,
        }


def is_massive(inputs: Mapping[str, Float[Tensor, "N _"]], limits: Mapping[str, float]) -> Bool[Tensor, " N"] | None:
    """Mark the rows that are massive at one of the sites; None where none is, or no limit is known."""
    marks = [inputs[site].float().norm(dim=1) > limit for site, limit in limits.items()]
    if not marks:
        return None
    massive_N = torch.stack([mark.to(marks[0].device) for mark in marks]).any(0)
    return massive_N if bool(massive_N.any()) else None
