"""python -m train.interop.export saes=outputs/demo/saes/sae-topk to=saelens out=exported: SAEs for other tools"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from data.base import cli
from data.base.errors import UserError
from data.base.files import atomic_file, refuse_full
from train.interop.config import ExportSettings

if TYPE_CHECKING:
    from train.interop.foreign import Files

CARD = "README.md"


def export(folder: Path, to: str, out: Path, report: Path | None = None) -> None:
    """Write the SAE in `folder` into `out` in a format of FORMATS, with a model card; UserError where it cannot be."""
    from train.interop import FORMATS
    from train.interop.card import card, reported
    from train.interop.fold import folded
    from train.interop.foreign import Origin
    from train.sae import load, load_config

    if to not in FORMATS:
        raise UserError(f"to={to} is unknown: choose one of {', '.join(FORMATS)}, circuit_tracer")
    refuse_full(out)
    config = load_config(folder)
    origin = Origin.of(config, folder)
    found = None if report is None else reported(report, folder, origin.fingerprint)
    sae = folded(load(folder))
    files = FORMATS[to].files(sae, origin)
    loading = FORMATS[to].loading.format(folder=out.name)
    files[CARD] = card(sae, origin, config, loading, found).encode()
    _write(out, files)


def export_set(folders: Sequence[Path], out: Path) -> None:
    """Write transcoders, one a layer, into `out` as circuit-tracer's set, with a card; UserError for others."""
    from train.interop import circuit_tracer
    from train.interop.card import set_card

    refuse_full(out)
    layers = circuit_tracer.layers_of(folders)
    files = circuit_tracer.files(layers)
    loading = circuit_tracer.LOADING.format(folder=out.name, layers=len(layers))
    files[CARD] = set_card([layer.folder for layer in layers], layers[0].origin, loading).encode()
    _write(out, files)


def _write(out: Path, files: Files) -> None:
    """Write the files of a folder, tensors a piece at a time."""
    from train.sae.weights_file import TensorFile

    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_file(out / name) as file:
            for piece in content.pieces() if isinstance(content, TensorFile) else [content]:
                file.write(piece)


def main(config: DictConfig) -> None:
    """Run the command from Hydra's configuration."""
    settings = ExportSettings.of(cli.stage_settings(config, "export"))
    if settings.to == "circuit_tracer":
        folders = list(settings.folders())
        out = Path(settings.out or "")
        export_set(folders, out)
        print(f"{len(folders)} transcoders -> {out}")
        return
    report = Path(settings.report) if settings.report else None
    for folder, out in settings.folders().items():
        export(folder, settings.to, out, report)
        print(f"{folder} -> {out}")


if __name__ == "__main__":
    cli.run(main, "export")
