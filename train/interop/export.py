"""python -m train.interop.export saes=outputs/demo/saes/sae-topk to=saelens out=exported: SAEs for other tools"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.base import cli
from data.base.errors import UserError
from data.base.files import expand_globs, write_atomic

CARD = "README.md"


def matching(settings: Mapping[str, Any]) -> dict[Path, Path]:
    """The folders that `saes` names, by the folder that each goes to: `out` for a single one, else below `out`."""
    if not settings["out"]:
        raise UserError("out is not set: name the folder to write")
    given, out = settings["saes"], Path(settings["out"])
    if not given:
        raise UserError("saes is not set: name the folder of an SAE, or a glob of several")
    if isinstance(given, str) and Path(given).is_dir():
        return {Path(given): out}
    patterns: Sequence[str] = [given] if isinstance(given, str) else [str(one) for one in given]
    found: dict[Path, Path] = {}
    for pattern in patterns:
        folders = [Path(match) for match in expand_globs(pattern) if Path(match).is_dir()]
        if not folders:
            raise UserError(f"saes={pattern} matches no folder: mend the path")
        found |= {folder: out / folder.name for folder in folders}
    if len(set(found.values())) < len(found):
        raise UserError("several folders of saes have one name and would be written to one place: take them apart")
    return found


def refuse_full(out: Path) -> None:
    """Refuse a folder that something is in already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another folder with out=<folder>, or remove it")


def export(folder: Path, to: str, out: Path, report: Path | None = None) -> None:
    """Write the SAE in `folder` into `out` in a format of FORMATS, with a model card; UserError where it cannot be."""
    from train.interop import FORMATS
    from train.interop.card import card, reported
    from train.interop.fold import folded
    from train.interop.foreign import Origin
    from train.sae import load, load_config

    if to not in FORMATS:
        raise UserError(f"to={to} is unknown: choose one of {', '.join(FORMATS)}")
    refuse_full(out)
    config = load_config(folder)
    origin = Origin.of(config, folder)
    found = None if report is None else reported(report, folder, origin.fingerprint)
    sae = folded(load(folder))
    files = FORMATS[to].files(sae, origin)
    loading = FORMATS[to].loading.format(folder=out.name)
    files[CARD] = card(sae, origin, config, loading, found).encode()
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(out / name, data)


def main(config: DictConfig) -> None:
    """The command, from Hydra's configuration."""
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    settings: Mapping[str, Any] = {str(name): value for name, value in found.items()}
    report = Path(settings["report"]) if settings["report"] else None
    for folder, out in matching(settings).items():
        export(folder, str(settings["to"]), out, report)
        print(f"{folder} -> {out}")


if __name__ == "__main__":
    cli.run(main, "export")
