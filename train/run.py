"""From settings to a trained SAE in a folder: the cheap checks, then the training, then one line that sums it up."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from pydantic import Field

from data.base import cli
from data.base.calls import composed, overrides_of, settings_of_call
from data.base.config import Real, Settings, Whole
from data.base.errors import UserError
from data.base.records import canonical
from train.closing import evaluate_line
from train.config import VARIANT_ALIASES, Group, TrainSettings, by_name, check_installed, of_scope
from train.plan import DataPlan, TrainRun, group_by_stream, make_plan
from train.rates import with_rate
from train.result import TrainResult
from train.resume import first_rank, only_writer, resumed, step_to_resume, stored_chunks, write_run
from train.sweep import job_folder, write_overrides

if TYPE_CHECKING:
    from train.sae import SAE
    from train.sae.parts.split import LatentSplit

MOST_LATENTS = 10**9  # more is a slip of the keyboard, and would end in a failed allocation and not in a sentence
_OFF_UNIT = 0.01  # rows of W_dec: dictionary_learning leaves its own off by about its learning rate


class SizeSettings(Settings):
    """How wide an SAE is: one of two ways to say it, so neither is a setting of the variant."""

    width: Whole | None = Field(None, ge=1, le=MOST_LATENTS)
    """Latents; goes before `expansion`."""
    expansion: Real | None = Field(None, gt=0, le=MOST_LATENTS)
    """Latents / width of the site, of a crosscoder the widest of its sites."""


@dataclass(frozen=True)
class TrainRequest:
    """What one Hydra job asks for: resolved settings, the overrides behind them, the folder of its sweep or None."""

    settings: Group
    overrides: Sequence[str] = ()
    sweep: Path | None = None

    @property
    def folder(self) -> Path:
        """Return where it trains, before anything is checked."""
        return Path(str(self.settings.get("resume") or self.settings.get("out")))


def main(config: DictConfig) -> None:
    """Train the Hydra job."""
    train_all([request_of(config)])


def request_of(config: DictConfig) -> TrainRequest:
    """Read the Hydra job's settings, with what Hydra knows of it."""
    overrides, sweep = [], None
    if HydraConfig.initialized():
        job = HydraConfig.get()
        overrides = list(job.overrides.task)
        sweep = Path(job.sweep.dir) if job.mode == RunMode.MULTIRUN else None
    return TrainRequest(cli.stage_settings(config, "train", TrainSettings), overrides, sweep)


def train(config: Mapping[str, Any] | None = None, overrides: Sequence[str] = (), **settings: Any) -> TrainResult:
    """Train one SAE, or go on with it (`resume=folder`); gives its folder, record, held-out figures and the SAE.

    `settings` are those of conf/train.yaml, groups by an option's name or as a mapping, dotted names by
    `**{"sae.k": 16}`; or `config` is a whole configuration, as Hydra composes one, and `overrides` those behind it.
    Raises UserError in one sentence for what cannot be.
    """
    if config is None:
        with composed("train", settings) as made:
            request = request_of(made)
    else:
        request = TrainRequest(settings_of_call("train", config, settings), overrides)
    train_all([request])
    return TrainResult(request.folder)


def train_sweep(variations: Sequence[Mapping[str, Any]], out: str | Path, **shared: Any) -> list[TrainResult]:
    """Train several SAEs, all that can share it in one pass over the store; gives their results in order.

    Each variation has settings of one SAE beside the shared ones, both as `train` takes them. Its folder below `out` is
    named by what differs, and the same call again goes on where an earlier one ended. A UserError at the end names
    those that failed; the others are trained by then.
    """
    each = [{**shared, **variation} for variation in variations]
    overrides = [overrides_of(given) for given in each]
    if not overrides:
        raise UserError("train_sweep has no variations: give a list of settings, one mapping for each SAE")
    common = set(overrides[0]).intersection(*overrides)
    varied = frozenset(item.split("=")[0] for items in overrides for item in items if item not in common)
    requests = []
    for given, items in zip(each, overrides, strict=True):
        folder = Path(out) / job_folder(items, varied, str(out))
        with composed("train", {**given, "out": folder}) as made:
            requests.append(replace(request_of(made), sweep=Path(out)))
        write_overrides(folder, items)
    train_all(requests)
    return [TrainResult(request.folder) for request in requests]


def train_all(jobs: Sequence[TrainRequest]) -> None:
    """Train what the jobs ask for, all that can share a pass over the cache side by side.

    A UserError at the end names those that failed, and why where that was not said before; the others are trained by
    then.
    """
    failed: dict[str, str] = {}
    runs = _prepared(jobs, failed)
    said = _say_left_out(failed) if runs else set[str]()
    groups = group_by_stream(list(runs.values()))
    if len(groups) > 1:
        print(f"{len(runs)} SAEs in {len(groups)} passes over the cache, as they differ in {_apart(groups)}")
    trained: list[Path] = []
    with contextlib.ExitStack() as locks:
        for run in runs.values() if first_rank() else []:
            locks.enter_context(only_writer(run.folder))
            if step_to_resume(run.folder, run.settings, run.plan) != run.step:
                raise UserError(f"{run.folder} was written by another training until now: start this one again")
            write_run(run.folder, run.settings, run.plan)
        runs.clear()
        while groups:  # a group's SAEs are let go as it ends
            from train.fit import fit  # Lightning is imported here, after every check that can do without it

            group = groups.pop(0)
            folders = {run.name: run.folder for run in group}
            try:
                stopped = fit(group)
            except UserError as error:
                stopped = dict.fromkeys(folders, str(error))
            else:
                # Those of one pass are named as they stop (train/lit.py, train/fit.py).
                said |= stopped.keys() if len(group) > 1 else set()
            failed |= stopped
            trained += [folder for name, folder in folders.items() if name not in stopped]
    if trained and first_rank():
        print(evaluate_line(trained))
    if failed:
        raise UserError(_summary(failed, len(jobs), said))


def _prepared(jobs: Sequence[TrainRequest], failed: dict[str, str]) -> dict[Path, TrainRun]:
    """Prepare the runs of the jobs that pass every check, by folder;
    why the others do not goes into `failed`, by name."""
    runs: dict[Path, TrainRun] = {}
    plans: dict[str, DataPlan] = {}
    for job, name in zip(jobs, _names(jobs), strict=True):
        try:
            if job.folder in runs:
                raise UserError(f"{job.folder} is the folder of several jobs: make hydra.sweep.subdir tell them apart")
            run = prepare(job, plans)
        except UserError as error:
            failed[name] = str(error)
        else:
            if run is not None:
                runs[job.folder] = replace(run, name=name)
    return runs


def _by_reason(failed: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of those that failed by why they did, each reason once."""
    names: dict[str, list[str]] = {}
    for name, why in failed.items():
        names.setdefault(why, []).append(name)
    return names


def _say_left_out(failed: Mapping[str, str]) -> set[str]:
    """Print which SAEs the others go on without, a line for each reason; return their names."""
    for why, names in _by_reason(failed).items():
        print(f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out: {why}", file=sys.stderr)
    return set(failed)


def _names(jobs: Sequence[TrainRequest]) -> list[str]:
    """Name what tells the jobs apart: the overrides that not all of them have, else their folders."""
    shared = set.intersection(*(set(job.overrides) for job in jobs))
    own = [" ".join(item for item in job.overrides if item not in shared) for job in jobs]
    if len(set(own)) == len(jobs) > 1:
        return own
    short = [job.folder.name for job in jobs]
    return short if len(set(short)) == len(jobs) else [str(job.folder) for job in jobs]


def _apart(groups: Sequence[Sequence[TrainRun]]) -> str:
    """Name the settings in which the groups' streams differ."""
    streams = [group[0].stream() for group in groups]
    names = [name for name in streams[0] if any(stream[name] != streams[0][name] for stream in streams)]
    return ", ".join(names) or "the step they stand at"


def _summary(failed: Mapping[str, str], count: int, said: Set[str]) -> str:
    """Write one sentence for all that failed of `count`; why those in `said` did was printed before."""
    if count == 1:
        return next(iter(failed.values()))
    new = _by_reason({name: why for name, why in failed.items() if name not in said})
    all_alike = len(failed) == count and len(new) == 1 and not said
    reasons = [why if all_alike else f"{', '.join(names)} ({why})" for why, names in new.items()]
    old = [name for name in failed if name in said]
    reasons += [f"{', '.join(old)} (why is said above)"] if old else []
    many = f"all {count}" if len(failed) == count else f"{len(failed)} of {count}"
    return f"{many} SAEs failed: {'; '.join(reasons)}"


def prepare(
    job: TrainRequest, plans: dict[str, DataPlan] | None = None, *, shapes_only: bool = False
) -> TrainRun | None:
    """Make every check of a job that can be made before it trains;
    return its run, or None where its folder holds the SAE already.

    `plans` keeps the plans made, which jobs share that differ in nothing but the SAE and its optimizer. With
    `shapes_only` the SAE has no weights, for a machine that only hands the job on.
    """
    plans = {} if plans is None else plans
    if any(item.lstrip("+").startswith("lr_asked=") for item in job.overrides):
        raise UserError("lr_asked is what a run records and no setting: give optimizer.lr")
    given = resumed(job.settings, job.overrides) if job.settings.get("resume") else job.settings
    settings = TrainSettings.of(given)
    check_installed(settings.logger.name)
    check_installed(settings.optimizer.name)
    folder = Path(settings.out)
    stored = stored_chunks(folder)
    shared = canonical([stored, of_scope(settings, "stream", "store", "pass")])
    if shared not in plans:
        plans[shared] = make_plan(settings, job.overrides, job.sweep is not None and not shapes_only, stored)
    plan = plans[shared]
    # From here on the run has numbers for what was `auto`, so that it goes on with them whatever the store grows into,
    # and its target is a site.
    settled = {"outliers": plan.outliers.times if plan.outliers else None, "target": plan.target}
    settings = settings.model_copy(update=settled)
    # The width that the rate is for: `lr_at_width` brings it from there to the run's own.
    latents = settings.lr_at_width or latents_of(settings.sae, plan.site_width, job.overrides)
    settings = with_rate(
        settings, plan.d_in, plan.steps, batch=plan.batch * plan.world, expansion=latents / plan.site_width
    )
    step = step_to_resume(folder, settings, plan)
    if step is None:
        print(f"{folder} holds this SAE already: nothing to do")
        return None
    with without_weights() if shapes_only else contextlib.nullcontext():
        split = None if shapes_only else _split(settings)
        sae = build(settings.sae, plan.d_in, job.overrides, plan.d_out, split, plan.site_widths)
    sae.site, sae.target = plan.site, plan.target
    if sae.needs_calibration and plan.reserved_rows < plan.batch * plan.world:
        on_ranks = f" on {plan.world} ranks" if plan.world > 1 else ""
        raise UserError(
            f"calibration_tokens={settings.calibration_tokens} sets {plan.reserved_rows} rows aside, fewer than one "
            f"batch={plan.batch}{on_ranks}, and the threshold of {sae.name} is calibrated on them: raise it"
        )
    if settings.start and not step and not shapes_only:
        start(sae, Path(settings.start))
    return TrainRun(settings, plan, sae, folder, folder.name, step, job.sweep)


def _split(settings: TrainSettings) -> LatentSplit | None:
    """Say which latents this process holds; None for all."""
    if settings.trainer.latent_ranks == 1:
        return None
    from train.mesh import latent_split

    return latent_split(settings)


def without_weights() -> contextlib.AbstractContextManager[Any]:
    """Let SAEs be built as shapes only, which take no memory."""
    import torch

    return torch.device("meta")


def start(sae: SAE, folder: Path) -> None:
    """Give `sae` the weights, norm, moments and threshold of the SAE in `folder`; UserError names what does not fit."""
    from train.sae.io import load, read_rows
    from train.sae.parts.sites import norms_by_site

    given = load(folder, sae.split)
    said = {"name": "sae", "d_in": "the site's width", "width": "sae.width", "input_norm": "sae.input_norm"}
    said |= {"apply_b_dec_to_input": "sae.apply_b_dec_to_input", "target": "target", "skip": "sae.skip"}
    said |= {"site_widths": "the list of its sites' widths"}
    for name, setting in said.items():
        here, there = getattr(sae, name), getattr(given, name)
        if here != there:
            raise UserError(
                f"start={folder} does not fit this run: {setting} is {there} there and {here} here, make them the same"
            )
    # Of all latents, as every process of a split dictionary must come to the same.
    lengths = (norms_by_site(rows_RE, given.norm_out.widths).sum(0) for rows_RE in read_rows(folder, "W_dec"))
    off = max(float((length_R - 1).abs().max()) for length_R in lengths)
    if sae.unit_rows and off > _OFF_UNIT:
        raise UserError(
            f"start={folder} has decoder rows that are not unit (by {off:.2g}), and {sae.name} would make them so and "
            "change what it computes: start from one with unit rows, or for relu take sae.form=april"
        )
    state = given.state_dict()
    if "skipped_batches" in state:
        state["skipped_batches"].zero_()  # it counts batches of a run
    if "sparsity_factor" in state:
        state["sparsity_factor"].fill_(1)  # of the coefficient of a run
    sae.load_state_dict(state)


def latents_of(sae: Mapping[str, Any], site_width: int, overrides: Sequence[str] = ()) -> int:
    """Count the latents that the group `sae` asks for at a site; `width` goes before `expansion`.

    Raises UserError where both or neither are given, or the product is no whole number.
    """
    width, expansion = sae.get("width"), sae.get("expansion")
    if width is not None and _given(overrides, "sae.expansion"):
        raise UserError(
            f"sae.width={width} and sae.expansion={expansion} both say how many latents: give one of them, and "
            "sae.width=null where a preset gives the width"
        )
    if width is None and expansion is None:
        raise UserError(
            "sae.width and sae.expansion are both null: give one of them, the latents or latents/site width"
        )
    size = SizeSettings.of({"width": width, "expansion": expansion}, "sae")
    # The width goes before the expansion, which conf/sae gives a default: a width on the command line is enough.
    if size.width is not None:
        return size.width
    assert size.expansion is not None, "one of the two is given"
    latents = size.expansion * site_width
    if latents != int(latents):
        raise UserError(f"sae.expansion={expansion} times the width {site_width} is not a whole number of latents")
    return int(latents)


def _given(overrides: Sequence[str], setting: str) -> bool:
    """Find whether a setting was given on the command line, and not as null."""
    return any(item.lstrip("+").split("=")[0] == setting for item in overrides if not item.endswith("=null"))


def build(
    settings: Mapping[str, Any],
    d_in: int,
    overrides: Sequence[str] = (),
    d_out: int | None = None,
    split: LatentSplit | None = None,
    site_widths: Sequence[int] | None = None,
) -> SAE:
    """Build the variant that the group `sae` describes, for activations of width `d_in`, or with `d_out` a transcoder,
    with `site_widths` a crosscoder; `width` goes before `expansion`. Of a `split` one only the latents of this process
    are made."""
    from train.sae import VARIANTS

    arguments = by_name(settings, "sae", "variant", VARIANT_ALIASES)
    name = arguments.pop("variant", None)
    for size in ("width", "expansion"):
        arguments.pop(size, None)
    if not isinstance(name, str) or name not in VARIANTS:
        raise UserError(f"sae.variant={name} is not a variant of this project: choose sae={'|'.join(VARIANTS)}")
    variant = VARIANTS[name]
    if d_out is not None and not _given(overrides, "sae.apply_b_dec_to_input"):
        arguments["apply_b_dec_to_input"] = False  # a variant's own default is for SAEs
    latents = latents_of(settings, d_in if site_widths is None else max(site_widths), overrides)
    config = variant.Config.of({"width": latents, **arguments}, "sae")
    form: dict[str, Any] = {"d_out": d_out, "site_widths": site_widths}
    if split is not None:
        form["split"] = split
    return variant(d_in, **form, **config.model_dump())
