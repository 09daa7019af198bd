"""python -m train.interop.export saes=outputs/demo/saes/sae-topk to=saelens out=exported: SAEs for other tools"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from data.base import cli
from data.base.errors import UserError
from data.base.files import write_atomic
from train.interop.config import ExportSettings, refuse_full

CARD = "README.md"


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
    """Run the command from Hydra's configuration."""
    settings = ExportSettings.of(cli.stage_settings(config, "export"))
    report = Path(settings.report) if settings.report else None
    for folder, out in settings.folders().items():
        export(folder, settings.to, out, report)
        print(f"{folder} -> {out}")


if __name__ == "__main__":
    cli.run(main, "export")
