"""From settings to a trained SAE in a folder: the cheap checks, then the training, then one line that sums it up."""

from __future__ import annotations

import inspect
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from data.errors import UserError
from data.manifest import canonical, differing
from data.settings import number, whole
from train.plan import LAST, Plan, Settings, checked, make_plan

if TYPE_CHECKING:
    from train.sae import SAE

RUN = "run.json"

# What may differ between a run and its continuation: where things are, what is shown, what it runs on.
_FREE = ("cache", "store", "out", "resume", "trainer", "logger", "log_every", "validate_every", "checkpoint_every")
_RESUME_TAKES = ("resume", "cache", "store", "trainer.")


def main(config: DictConfig) -> None:
    """The Hydra job."""
    overrides, multirun = [], False
    if HydraConfig.initialized():
        job = HydraConfig.get()
        overrides, multirun = list(job.overrides.task), job.mode == RunMode.MULTIRUN
    settings = OmegaConf.to_container(config, resolve=True)
    assert isinstance(settings, dict)
    train({str(name): value for name, value in settings.items()}, overrides, multirun)


def train(settings: Settings, overrides: Sequence[str] = (), multirun: bool = False) -> None:
    """Train what `settings` (conf/train.yaml, resolved) describe, or go on with it, into the folder `out`."""
    if settings["resume"]:
        settings = resumed(settings, overrides)
    folder = Path(settings["out"])
    settings = checked(settings)
    plan = make_plan(settings, overrides, multirun, _stored_chunks(folder))
    found = standing(folder, settings, plan)
    if found == "done":
        print(f"{folder} holds this SAE already: nothing to do")
        return
    sae = build(settings["sae"], plan.d_in, overrides)
    if sae.needs_calibration and plan.reserved_rows < plan.batch:
        raise UserError(
            f"calibration_tokens={settings['calibration_tokens']} sets {plan.reserved_rows} rows aside, fewer than one "
            f"batch={plan.batch}, and the threshold of {sae.name} is calibrated on them: raise it"
        )
    if int(os.environ.get("RANK", "0")) == 0:
        _write_run(folder, settings, plan)
    from train.fit import fit  # Lightning is imported here, after every check that can do without it

    line = fit(settings, plan, sae, folder, going_on=found == "interrupted")
    if line:
        print(line)


def build(settings: Mapping[str, Any], d_in: int, overrides: Sequence[str] = ()) -> SAE:
    """The variant that the group `sae` describes, for activations of width `d_in`; `width` goes before `expansion`."""
    from train.sae import VARIANTS

    arguments = dict(settings)
    target, width, expansion = (arguments.pop(key, None) for key in ("_target_", "width", "expansion"))
    variant = next((v for v in VARIANTS.values() if f"{v.__module__}.{v.__qualname__}" == target), None)
    if variant is None:
        raise UserError(f"sae._target_={target} is not a variant of this project: choose sae={'|'.join(VARIANTS)}")
    if {"sae.width", "sae.expansion"} <= {item.split("=")[0] for item in overrides if not item.endswith("=null")}:
        raise UserError(f"sae.width={width} and sae.expansion={expansion} both say how many latents: give one of them")
    if width is None and expansion is None:
        raise UserError(
            "sae.width and sae.expansion are both null: give one of them, the latents or latents/site width"
        )
    name, value = ("sae.width", width) if width is not None else ("sae.expansion", expansion)
    number({name: value}, name, 0, math.inf)
    if width is None and (width := expansion * d_in) != int(width):
        raise UserError(f"sae.expansion={expansion} times the width {d_in} is not a whole number of latents")
    if unknown := arguments.keys() - inspect.signature(variant).parameters.keys():
        raise UserError(f"variant {variant.name} has no setting {', '.join(sorted(unknown))}: leave it out")
    hints = get_type_hints(variant.__init__)
    for name, value in arguments.items():
        if not _fits(value, hints[name]):
            raise UserError(f"sae.{name}={value} is not of its type, {inspect.formatannotation(hints[name])}: mend it")
    return variant(d_in=d_in, width=whole({"sae.width": width}, "sae.width", 1), **arguments)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of the type that a variant's constructor states; whole numbers are floats too."""
    if isinstance(hint, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Sequence:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else hint)


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


def standing(folder: Path, settings: Settings, plan: Plan) -> str:
    """Where the run in `folder` stands: `new`, `interrupted` or `done`; another run is refused by its fields."""
    from train.sae.io import CONFIG

    if not (folder / RUN).is_file():
        if (folder / CONFIG).is_file():
            raise UserError(f"{folder} holds an SAE already: choose another folder with hydra.run.dir=<folder>")
        return "new"
    fields = differing(_read_run(folder)["numbers"], numbers(settings, plan))
    if fields and ((folder / CONFIG).is_file() or (folder / LAST).is_file()):
        raise UserError(
            f"{folder} holds another run ({'; '.join(fields)}): choose another folder with hydra.run.dir=<folder>, "
            "or remove that one"
        )
    if (folder / CONFIG).is_file():
        return "done"
    if not (folder / LAST).is_file():
        return "new"
    if not _is_whole(folder / LAST):
        raise UserError(f"{folder / LAST} is damaged, so there is nothing to go on from: remove the folder, train anew")
    return "interrupted"


def _is_whole(checkpoint: Path) -> bool:
    """Whether every part of a checkpoint, which is a zip file, has its checksum."""
    try:
        with zipfile.ZipFile(checkpoint) as parts:
            return parts.testzip() is None
    except zipfile.BadZipFile:
        return False


def numbers(settings: Settings, plan: Plan) -> Settings:
    """What determines the numbers of a run, the store's identity with it."""
    kept = {name: value for name, value in settings.items() if name not in (*_FREE, "model", "text", "packing")}
    kept["loader"] = {"pool_chunks": settings["loader"]["pool_chunks"]}  # the rest changes no number
    return {**kept, "store": plan.store.manifest.fingerprint, "world": plan.world}


def _write_run(folder: Path, settings: Settings, plan: Plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "numbers": numbers(settings, plan), "stored_chunks": plan.stored_chunks}
    beside = folder / f"{RUN}.part"
    beside.write_text(canonical(record) + "\n", encoding="utf-8")
    beside.replace(folder / RUN)


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if {"settings", "numbers", "stored_chunks"} <= found.keys():
            return found
    except (ValueError, AttributeError):  # not JSON, or not an object
        pass
    raise UserError(f"{folder / RUN} is damaged: remove the folder and train anew")


def _stored_chunks(folder: Path) -> int | None:
    """How much of the store the run that stands in `folder` began with."""
    return int(_read_run(folder)["stored_chunks"]) if (folder / RUN).is_file() else None
