"""`python -m benchmarks.claims`: harvest and train what a study asks for, score each SAE once, decide each claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from benchmarks.claims.sweeps import Study, run_all
from data.base.config import Real, Settings, Text, Whole
from data.base.errors import UserError
from data.base.location import parse_location
from data.base.records import Json, canonical
from evaluate.inputs import SavedSAE, find_saes, group_by_store

if TYPE_CHECKING:
    from benchmarks.claims.scores import Candidate, ScoredSite

WIDEST_RESCALED = 8192  # latents; the fit holds a few matrices of twice that, squared, in float64


class ClaimsSettings(Settings):
    """Settings of the decision, beside the study of what is trained."""

    study: Study | None = None
    """What to harvest and train before; null: the SAEs are there."""
    saes: Text | list[Text]
    """Folders or globs of SAEs: of one model and site, and of one store beside it with special tokens."""
    cache: Text
    """The folder of the stores they were trained from."""
    expansion: Real = Field(gt=0)
    """The fixed width, over the site's, of the claims that vary something else."""
    batch: Whole = Field(ge=1)
    """The batch of those that do not vary it."""
    tokens: Whole = Field(ge=1)
    """Held-out tokens to score; whole contexts, so a few more."""
    calibration_tokens: Whole = Field(ge=1)
    """Rows for thresholds of SAEs that had none, and for rescaling; as training set them aside."""
    lm_batch: Whole | None = Field(None, ge=1)
    """Contexts the model reads at a time; null: as the harvest did."""
    bootstrap: Whole = Field(ge=2)
    """Samples of documents behind each interval."""
    seed: Whole = Field(ge=0)
    """Of the bootstrap."""
    device: Text = "auto"
    """Of the language model and the SAEs."""
    device_map: Any = None
    """How the model is spread over devices; null: on one."""
    out: Text
    """The folder of the report."""


def judge(config: Mapping[str, Any]) -> Path:
    """Do what a resolved configuration asks for; the path of the report."""
    settings = ClaimsSettings.of(config)
    if settings.study is not None:
        run_all(settings.study, settings.cache, settings.out)
    (store, name, saes), special = _sites(settings)
    from benchmarks.claims import gated_jumprelu, report, scaling, topk
    from benchmarks.claims.bench import Bench
    from benchmarks.claims.scores import Candidate, ScoredSite

    out = Path(settings.out)
    options = settings.model_dump()
    site = ScoredSite(store, name, options)
    scored = site.score(candidates(saes, settings.expansion, settings.batch), out / "scores")
    scored_special = []
    if special is not None:
        special_store, special_name, special_saes = special
        special_site = ScoredSite(special_store, special_name, options)
        scored_special = special_site.score([Candidate(sae) for sae in special_saes], out / "scores")
    bench = Bench(scored, scored_special, options)
    by_folder = {sae.folder: sae for sae in saes}
    findings = topk.claims(bench)
    findings += gated_jumprelu.claims(bench, lambda sae: site.batches(by_folder[sae.folder])[0])
    findings += scaling.claims(bench)
    return report.write(bench, findings, _place(site, bench.main[0].firing), out)


def _sites(settings: ClaimsSettings) -> tuple[Any, Any]:
    """Give (store, site, SAEs) of the rows without special tokens, and of those with them, or None."""
    by_special: dict[bool, Any] = {False: None, True: None}
    for store, sites in group_by_store(find_saes(settings.saes), parse_location(settings.cache)):
        for site, saes in sites.items():
            special = bool(store.manifest.settings["packing"]["keep_special"])
            if by_special[special] is not None:
                raise UserError(
                    f"saes={settings.saes} holds SAEs of several sites or stores whose rows are "
                    f"{'with' if special else 'without'} special tokens: name the folder of one model's claims"
                )
            by_special[special] = (store, site, saes)
    if by_special[False] is None:
        raise UserError(f"saes={settings.saes} holds no SAE of rows without special tokens: train the grid first")
    return by_special[False], by_special[True]


def candidates(saes: Sequence[SavedSAE], expansion: float, batch: int) -> list[Candidate]:
    """List every SAE in its inference form, and those of the fixed width in the other forms that a claim compares.

    Of SAEs that two sweeps have in common one is taken.
    """
    from benchmarks.claims.bench import BASELINE
    from benchmarks.claims.scores import BATCH, INFERENCE, PER_TOKEN, RESCALED, THRESHOLD, Candidate, options

    forms = {"batchtopk": [BATCH, PER_TOKEN], "topk": [THRESHOLD], "relu": [RESCALED]}
    listed = []
    seen = set()
    for sae in saes:
        variant, settings, training = sae.config["variant"], sae.config["settings"], sae.config["training"]
        identity = canonical([variant, settings, {name: training[name] for name in ("tokens", "batch", "seed")}])
        if identity in seen:
            continue
        seen.add(identity)
        listed.append(Candidate(sae, INFERENCE))
        fixed = settings["width"] == expansion * settings["d_in"] and training["batch"] == batch
        plain = options(sae.config) == (BASELINE if variant == "relu" else {})
        if fixed and plain:
            listed += [
                Candidate(sae, form)
                for form in forms.get(variant, [])
                if form != RESCALED or settings["width"] <= WIDEST_RESCALED
            ]
    return listed


def _place(site: ScoredSite, firing: Json) -> Json:
    """Give what the report says of the site and the tokens."""
    manifest = site.store.manifest
    sizes = {name: firing[name] for name in ("heldout_tokens", "contexts", "documents", "context", "d_model")}
    return {"model": manifest.name, "site": site.site, "fingerprint": manifest.fingerprint, **sizes}


def main(config: DictConfig) -> None:
    """Run the stage from Hydra's configuration."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    print(f"report: {judge({str(name): value for name, value in resolved.items()})}")
