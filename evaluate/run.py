"""`python -m evaluate`: which SAEs, the store and site of each, the LM and the held-out text, then the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from data.base.calls import settings_of_call
from data.base.cli import stage_settings
from data.base.errors import UserError
from data.base.location import parse_location
from data.base.progress import progress
from data.base.records import Json
from data.base.sites import Site
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import Store
from evaluate.config import EvaluateSettings
from evaluate.feature_metrics.bases import BasisReader, neurons_before
from evaluate.feature_metrics.measure import FeatureMetricsConfig, measure
from evaluate.feature_metrics.sample import FeatureText
from evaluate.features.make import make_for
from evaluate.inputs import HeldoutText, SavedSAE, find_saes, group_by_store, open_text
from evaluate.massive import ScoredText
from evaluate.pareto import add_excess, baseline_of, best_at_equal_l0, compare, require_baseline, verdict
from evaluate.report import markdown, page
from evaluate.report.columns import REPORT_FORMAT, sae_name
from evaluate.report.verdict import ranking, verdict_sentences
from evaluate.result import Report
from evaluate.score import SiteScore
from evaluate.splice import Splice
from evaluate.together import measure_together, require_one_a_target
from harvest.model_ranks import ModelRanks, join_ranks
from harvest.packing import Packing, bos_id
from train.sae.io import load

BEST = "best"  # of `features`: the SAE that is best at equal L0


@dataclass(frozen=True)
class SiteRun:
    """One site of one store: its SAEs and the text they are all scored on."""

    store: Store
    name: str
    saes: Sequence[SavedSAE]
    scored: ScoredText
    settings: EvaluateSettings

    @property
    def text(self) -> HeldoutText:
        """Return the text without the rows that the SAEs were not made for."""
        return self.scored.text

    @property
    def folders(self) -> list[Path]:
        """Return the SAEs' folders."""
        return [sae.folder for sae in self.saes]

    def measure(self) -> SiteScore:
        """Sum over the whole text; all SAEs read the same contexts, so their figures are paired."""
        text = self.text
        score = SiteScore(
            Splice(text.model, Site.parse(self.name), [Site.parse(sae.site) for sae in self.saes]),
            [load(sae.folder) for sae in self.saes],
            torch.from_numpy(self.store.stats(TRAIN, self.name).mean),
            getattr(torch, self.store.layout.dtype),
            text.packed.contexts.shape,
            self.settings.form,
            documents=text.documents,
            massive_limits=self.scored.limits,
        )
        kind = "transcoder" if all(sae.transcodes for sae in self.saes) else "SAE"
        label = f"evaluate {len(self.saes)} {kind}{'s' * (len(self.saes) > 1)} at {self.name}"
        total = int(text.packed.keep.sum())
        with progress(label, total, "tokens") as bar:
            for batch in text.batches():
                score.batch(batch.ids_BT, batch.keep_BT, batch.numbers.start)
                bar.update(int(batch.keep_BT.sum()))
        return score

    def report(self, metrics: FeatureMetricsConfig | None) -> Json:
        """Measure, and give one site's part of the report."""
        score = self.measure()
        draws = {"samples": self.settings.bootstrap, "seed": self.settings.seed}
        results = score.result(**draws)
        rows = [describe_sae(sae, result) for sae, result in zip(self.saes, results, strict=True)]
        baseline = baseline_of(self.folders, self.settings.baseline)
        sums = [score.sums(each) for each in score.scores]
        compare(rows, sums, baseline, **draws)
        add_excess(rows, sums, **draws)
        groups = verdict(rows, sums, **draws)
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["variant"], rows[i]["metrics"]["l0"]["value"], i))
        rows = [{"number": number, **rows[i]} for number, i in enumerate(order, 1)]
        measured = {}
        if metrics is not None:
            named = {sae_name(row): score.scores[i].sae for row, i in zip(rows, order, strict=True)}
            measured = {"gao": measure(self.feature_text(), named, score.mean_D, density(rows), metrics)}
        return {**self.facts(score, baseline), "verdict": groups, "saes": rows, **measured}

    def facts(self, score: SiteScore, baseline: int | None) -> Json:
        """Return what the report says of the site, its store and its text."""
        packed = self.text.packed
        sequences, context = packed.contexts.shape
        massive = self.scored.result(score.massive_rows)
        inputs = sorted({sae.site for sae in self.saes if sae.transcodes})
        return {
            "site": self.name,
            **({"inputs": inputs} if inputs else {}),
            "store": self.store.path.name,
            "fingerprint": self.store.manifest.fingerprint,
            "model": self.store.manifest.name,
            "d_model": len(score.mean_D),
            "split": "own text" if self.text.own else HELDOUT,
            "context": context,
            "sequences": sequences,
            "documents": score.n_documents(),
            "tokens": int(packed.keep.sum()),
            "excluded": int((~packed.keep).sum()) - self.scored.left_out,
            "predicted": int(score.shared.of_contexts["predicted"].sum()),
            "storage": {"dtype": self.store.layout.dtype, "nmse": score.storage_nmse()},
            "baseline": None if baseline is None else str(self.saes[baseline].folder),
            **({"massive": massive} if massive["rows"] or massive["left_out"] or massive["note"] else {}),
            **({"text": self.text.own} if self.text.own else {}),
        }

    def feature_text(self) -> FeatureText:
        """Return the text as the feature metrics read it."""
        text, site = self.text, Site.parse(self.name)
        ids_1T = torch.from_numpy(text.packed.contexts[:1]).to(text.device, torch.int64)
        reader = BasisReader(text.model, site, neurons_before(text.model, site, ids_1T))
        bos = bos_id(text.tokenizer, Packing.of(self.store.manifest.settings["packing"]))
        return FeatureText(text, reader, bos)


def density(rows: Sequence[Json]) -> float:
    """Return the share of tokens on which a latent of these SAEs is active, on average."""
    return float(sum(row["metrics"]["l0"]["value"] / row["width"] for row in rows) / len(rows))


def describe_sae(sae: SavedSAE, result: Json) -> Json:
    """Write a row of the report: what the SAE is, and what was measured."""
    settings = sae.config["settings"]
    kind = ""
    if sae.transcodes:
        kind = " skip transcoder" if settings.get("skip") else " transcoder"
    return {
        "folder": str(sae.folder),
        **({"input": sae.site} if sae.transcodes else {}),
        "variant": sae.config["variant"] + kind,
        "width": settings["width"],
        "expansion": settings["width"] / settings["d_in"],
        "settings": settings,
        "training": sae.config.get("training", {}),
        **result,
    }


def require_features(name: str | None, folders: Sequence[Path]) -> None:
    """Raise UserError where `features` names none of the SAEs to be scored."""
    if name not in (None, BEST, *(folder.name for folder in folders)):
        names = ", ".join(dict.fromkeys(folder.name for folder in folders))
        raise UserError(f"features={name} is none of the SAEs: choose {BEST}, null or one of {names}")


def featured(report: Json, name: str) -> Json:
    """Find the row of the SAE that `features` names, the first in the report; `best` is the best one at equal L0."""
    if name == BEST:
        return best_at_equal_l0([site["saes"] for site in report["sites"]])
    rows: list[Json] = [row for site in report["sites"] for row in site["saes"]]
    return next(row for row in rows if Path(row["folder"]).name == name)


def evaluate(config: Mapping[str, Any] | None = None, **given: Any) -> Report:
    """Score trained SAEs on held-out text and write the report; gives it as numbers, table and files.

    `given` are settings of conf/evaluate.yaml, dotted names by `**{"text.paths": [...]}`; or `config` is a whole
    configuration, as Hydra composes one. Raises UserError in one sentence for what cannot be.
    """
    settings = EvaluateSettings.of(settings_of_call("evaluate", config, given))
    with join_ranks(settings.tp_plan) as ranks:
        return _evaluate(settings, ranks)


def _evaluate(settings: EvaluateSettings, ranks: ModelRanks) -> Report:
    """Score SAEs by this process, or by all that run the model together, of which the first writes the report."""
    metrics = FeatureMetricsConfig.of(settings)
    saes = find_saes(settings.saes)
    folders = [sae.folder for sae in saes]
    require_baseline(folders, settings.baseline)
    require_features(settings.features, folders)
    if settings.together:
        require_one_a_target(saes)
    if metrics is not None and (transcoders := [sae.folder for sae in saes if sae.transcodes]):
        raise UserError(
            f"feature_metrics are of SAEs, and {transcoders[0]} is a transcoder: leave them out, or its folder"
        )
    stores = group_by_store(saes, parse_location(settings.cache))
    for _, by_site in stores:
        for of_site in by_site.values():
            baseline_of([sae.folder for sae in of_site], settings.baseline)
    sites, together = [], []
    for store, by_site in stores:
        text = open_text(store, settings.model_dump())
        for name, of_site in by_site.items():
            scored = ScoredText.of(text, of_site)
            sites.append(SiteRun(store, name, of_site, scored, settings).report(metrics))
        if settings.together:
            of_store = [sae for of_site in by_site.values() for sae in of_site]
            together.append(measure_together(store, of_store, ScoredText.of(text, of_store), settings))
    if not ranks.leads:  # it has run its part of every forward, and its sums are those of the first
        return Report(ranks.receive())
    used = {name: getattr(settings, name) for name in ("tokens", "lm_batch", "bootstrap", "seed", "form")}
    made = datetime.now(UTC).isoformat(timespec="seconds")
    report: Json = {"format": REPORT_FORMAT, "made": made, "settings": used, "sites": sites}
    if together:
        report["together"] = together
    path = markdown.write_markdown(report, Path(settings.out))
    latents: dict[str, Path] = {}
    if settings.features is not None:
        folder = featured(report, settings.features)["folder"]
        latents[folder] = make_for(settings, folder)
    identities = {store.manifest.fingerprint: store.manifest.identity for store, _ in stores}
    for site in sites:
        print("\n".join([f"{site['site']} of {site['model']}:", *ranking(site), *verdict_sentences(site)]))
    print(f"page: {page.write_page(report, settings.model_dump(), identities, latents)}")
    ranks.send(path)
    return Report(path)


def main(config: DictConfig) -> None:
    """Run the stage on Hydra's configuration."""
    print(f"report: {evaluate(stage_settings(config, 'evaluate'))}")
