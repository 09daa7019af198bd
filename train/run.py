"""From settings to a trained SAE in a folder: the cheap checks, then the training, then one line that sums it up."""

from __future__ import annotations

import json
import math
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data.base import cli
from data.base.errors import UserError
from data.base.files import write_atomic
from data.base.records import canonical, diff_fields
from data.base.settings import number, whole
from train.plan import LAST, DataPlan, Settings, TrainRun, checked, group_by_stream, make_plan
from train.rates import with_rate

if TYPE_CHECKING:
    from train.sae import SAE

RUN = "run.json"

# What may differ between a run and its continuation: where things are, what is shown, what it runs on.
_FREE = (
    *("cache", "store", "out", "resume", "trainer", "logger", "log_every", "validate_every", "checkpoint_every"),
    "lr_asked",
)
# What is of one SAE and touches no plan.
_OF_ONE = (
    "sae",
    "optimizer",
    "clip",
    "ema",
    "lr_at_width",
    "dead_after",
    "lr_warmup",
    "lr_decay",
    "sparsity_warmup",
    "start",
    "log_every",
    "out",
    "logger",
    "lr_asked",
)
_OFF_UNIT = 0.01  # rows of W_dec: dictionary_learning leaves its own off by about its learning rate
_RESUME_TAKES = ("resume", "cache", "store", "trainer.")


@dataclass(frozen=True)
class TrainRequest:
    """What one Hydra job asks for: resolved settings, the overrides behind them, the folder of its sweep or None."""

    settings: Settings
    overrides: Sequence[str] = ()
    sweep: Path | None = None


def main(config: DictConfig) -> None:
    """The Hydra job."""
    train_all([asked(config)])


def asked(config: DictConfig) -> TrainRequest:
    """The Hydra job's settings, with what Hydra knows of it."""
    overrides, sweep = [], None
    if HydraConfig.initialized():
        job = HydraConfig.get()
        overrides = list(job.overrides.task)
        sweep = Path(job.sweep.dir) if job.mode == RunMode.MULTIRUN else None
    return TrainRequest(cli.stage_settings(config, "train"), overrides, sweep)


def train(settings: Settings, overrides: Sequence[str] = ()) -> None:
    """Train what `settings` (conf/train.yaml, resolved) describe, or go on with it, into the folder `out`."""
    train_all([TrainRequest(settings, overrides)])


def train_all(jobs: Sequence[TrainRequest]) -> None:
    """Train what the jobs ask for, all that can share a pass over the cache side by side.

    A UserError at the end names those that failed and why; the others are trained by then.
    """
    runs: dict[Path, TrainRun] = {}
    failed: dict[str, str] = {}
    plans: dict[str, DataPlan] = {}
    for job, name in zip(jobs, _names(jobs), strict=True):
        folder = Path(job.settings["resume"] or job.settings["out"])
        try:
            if folder in runs:
                raise UserError(f"{folder} is the folder of several jobs: make hydra.sweep.subdir tell them apart")
            if (run := prepare(job, plans)) is not None:
                runs[folder] = replace(run, name=name)
        except UserError as error:
            failed[name] = str(error)
            if len(jobs) > 1:
                print(f"{name} is left out: {error}", file=sys.stderr)
    groups = group_by_stream(list(runs.values()))
    if len(groups) > 1:
        print(f"{len(runs)} SAEs in {len(groups)} passes over the cache, as they differ in {_apart(groups)}")
    for run in runs.values():
        if int(os.environ.get("RANK", "0")) == 0:
            _write_run(run.folder, run.settings, run.plan)
    runs.clear()
    while groups:  # a group's SAEs are let go as it ends
        from train.fit import fit  # Lightning is imported here, after every check that can do without it

        group = groups.pop(0)
        try:
            failed |= fit(group)
        except UserError as error:
            failed |= dict.fromkeys((run.name for run in group), str(error))
    if failed:
        raise UserError(_told(failed, len(jobs)))


def _names(jobs: Sequence[TrainRequest]) -> list[str]:
    """What tells the jobs apart: the overrides that not all of them have, else their folders."""
    shared = set.intersection(*(set(job.overrides) for job in jobs))
    own = [" ".join(item for item in job.overrides if item not in shared) for job in jobs]
    if len(set(own)) == len(jobs) > 1:
        return own
    folders = [Path(job.settings["out"]) for job in jobs]
    short = [folder.name for folder in folders]
    return short if len(set(short)) == len(jobs) else [str(folder) for folder in folders]


def _apart(groups: Sequence[Sequence[TrainRun]]) -> str:
    """The settings in which the groups' streams differ."""
    streams = [group[0].stream() for group in groups]
    names = [name for name in streams[0] if any(stream[name] != streams[0][name] for stream in streams)]
    return ", ".join(names) or "the step they stand at"


def _told(failed: Mapping[str, str], count: int) -> str:
    """One sentence for all that failed of `count`."""
    reasons = list(failed.values())
    if len(set(reasons)) == 1 and len(failed) == count:
        return reasons[0] if count == 1 else f"all {count} SAEs failed: {reasons[0]}"
    each = "; ".join(f"{name} ({why})" for name, why in failed.items())
    return f"{len(failed)} of {count} SAEs failed: {each}"


def prepare(job: TrainRequest, plans: dict[str, DataPlan] | None = None) -> TrainRun | None:
    """Every check of a job that can be made before it trains; None where its folder holds the SAE already.

    `plans` keeps the plans made, which jobs share that differ in nothing but the SAE and its optimizer.
    """
    plans = {} if plans is None else plans
    settings = resumed(job.settings, job.overrides) if job.settings["resume"] else job.settings
    folder = Path(settings["out"])
    settings = checked(settings)
    stored = _stored_chunks(folder)
    shared = canonical([stored, {name: value for name, value in settings.items() if name not in _OF_ONE}])
    if shared not in plans:
        plans[shared] = make_plan(settings, job.overrides, job.sweep is not None, stored)
    plan = plans[shared]
    settings = with_rate(settings, plan.d_in, plan.steps)
    step = standing(folder, settings, plan)
    if step is None:
        print(f"{folder} holds this SAE already: nothing to do")
        return None
    sae = build(settings["sae"], plan.d_in, job.overrides)
    if sae.needs_calibration and plan.reserved_rows < plan.batch:
        raise UserError(
            f"calibration_tokens={settings['calibration_tokens']} sets {plan.reserved_rows} rows aside, fewer than one "
            f"batch={plan.batch}, and the threshold of {sae.name} is calibrated on them: raise it"
        )
    if settings["start"] and not step:
        start(sae, Path(settings["start"]))
    return TrainRun(settings, plan, sae, folder, folder.name, step, job.sweep)


def start(sae: SAE, folder: Path) -> None:
    """Give `sae` the weights, norm, moments and threshold of the SAE in `folder`; UserError names what does not fit."""
    from train.sae import load

    given = load(folder)
    said = {"name": "sae", "d_in": "the site's width", "width": "sae.width", "input_norm": "sae.input_norm"}
    for name, setting in {**said, "apply_b_dec_to_input": "sae.apply_b_dec_to_input"}.items():
        here, there = getattr(sae, name), getattr(given, name)
        if here != there:
            raise UserError(
                f"start={folder} does not fit this run: {setting} is {there} there and {here} here, make them the same"
            )
    off = float((given.W_dec.detach().norm(dim=1) - 1).abs().max())
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


def build(settings: Mapping[str, Any], d_in: int, overrides: Sequence[str] = ()) -> SAE:
    """The variant that the group `sae` describes, for activations of width `d_in`; `width` goes before `expansion`."""
    from train.sae import VARIANTS

    arguments = dict(settings)
    target, width, expansion = (arguments.pop(key, None) for key in ("_target_", "width", "expansion"))
    variant = next((v for v in VARIANTS.values() if f"{v.__module__}.{v.__qualname__}" == target), None)
    if variant is None:
        raise UserError(f"sae._target_={target} is not a variant of this project: choose sae={'|'.join(VARIANTS)}")
    given = {item.lstrip("+").split("=")[0] for item in overrides if not item.endswith("=null")}
    if "sae.expansion" in given and width is not None:
        raise UserError(
            f"sae.width={width} and sae.expansion={expansion} both say how many latents: give one of them, and "
            "sae.width=null where a preset gives the width"
        )
    if width is None and expansion is None:
        raise UserError(
            "sae.width and sae.expansion are both null: give one of them, the latents or latents/site width"
        )
    name, value = ("sae.width", width) if width is not None else ("sae.expansion", expansion)
    number({name: value}, name, 0, math.inf)
    if width is None and (width := expansion * d_in) != int(width):
        raise UserError(f"sae.expansion={expansion} times the width {d_in} is not a whole number of latents")
    config = variant.Config.of({"width": whole({"sae.width": width}, "sae.width", 1), **arguments}, "sae")
    return variant(d_in, **config.model_dump())


def resumed(settings: Settings, overrides: Sequence[str]) -> Settings:
    """The settings of the run that `resume` names; only places and the device may be given anew."""
    folder = Path(settings["resume"])
    if not (folder / RUN).is_file():
        raise UserError(f"resume={folder} is not the folder of a training run (it has no {RUN}): give one that has")
    if not (folder / LAST).is_file():
        raise UserError(f"{folder / LAST} is missing, so there is nothing to go on from: train anew")
    strange = [item for item in overrides if not item.lstrip("+~").startswith(_RESUME_TAKES)]
    if strange:
        raise UserError(f"resume takes its settings from the run and would ignore {', '.join(strange)}: leave it out")
    saved: Settings = _read_run(folder)["settings"]
    given = {name: settings[name] for name in ("cache", "store") if any(i.startswith(f"{name}=") for i in overrides)}
    changes = OmegaConf.from_dotlist([item for item in overrides if item.startswith("trainer.")])
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(saved), changes))
    assert isinstance(merged, dict)
    return {str(name): value for name, value in merged.items()} | given | {"out": str(folder), "resume": None}


def standing(folder: Path, settings: Settings, plan: DataPlan) -> int | None:
    """The step the run in `folder` stands at, None where it is done; another run is refused by its fields."""
    from train.sae.io import CONFIG

    if not (folder / RUN).is_file():
        if (folder / CONFIG).is_file():
            raise UserError(f"{folder} holds an SAE already: choose another folder with hydra.run.dir=<folder>")
        return 0
    fields = diff_fields(_read_run(folder)["numbers"], numbers(settings, plan))
    if fields and ((folder / CONFIG).is_file() or (folder / LAST).is_file()):
        raise UserError(
            f"{folder} holds another run ({'; '.join(fields)}): choose another folder with hydra.run.dir=<folder>, "
            "or remove that one"
        )
    if (folder / CONFIG).is_file():
        return None
    return _step_of(folder / LAST) if (folder / LAST).is_file() else 0


def _step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, a zip file each part of which must have its checksum."""
    import torch

    try:
        with zipfile.ZipFile(checkpoint) as parts:
            whole = parts.testzip() is None
    except zipfile.BadZipFile:
        whole = False
    if not whole:
        raise UserError(f"{checkpoint} is damaged, so there is nothing to go on from: remove the folder, train anew")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    if "step" not in state:
        raise UserError(f"{checkpoint} is of an earlier version: remove the folder, train anew")
    return int(state["step"])


def numbers(settings: Settings, plan: DataPlan) -> Settings:
    """What determines the numbers of a run, the store's identity with it."""
    kept = {name: value for name, value in settings.items() if name not in (*_FREE, "model", "text", "packing")}
    kept["loader"] = {"pool_chunks": settings["loader"]["pool_chunks"]}  # the rest changes no number
    return {**kept, "store": plan.store.manifest.fingerprint, "world": plan.world}


def _write_run(folder: Path, settings: Settings, plan: DataPlan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "numbers": numbers(settings, plan), "stored_chunks": plan.stored_chunks}
    write_atomic(folder / RUN, canonical(record) + "\n")


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if {"settings", "numbers", "stored_chunks"} <= found.keys():
            return found
    except (ValueError, AttributeError):  # not JSON, or not an object
        pass
    raise UserError(f"{folder / RUN} is damaged: remove the folder and train anew")


def _stored_chunks(folder: Path) -> int | None:
    """How much of the store the run that stands in `folder` began with; None where it left nothing to go on from."""
    from train.sae.io import CONFIG

    stands = (folder / LAST).is_file() or (folder / CONFIG).is_file()
    return int(_read_run(folder)["stored_chunks"]) if stands else None
