"""The settings of `python -m train.interop.export` and `import_sae`: conf/export.yaml and conf/adopt.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from data.base.config import Settings, Text
from data.base.errors import UserError
from data.base.files import expand_globs


class FolderSettings(Settings):
    """Which folders are read, and where each one goes."""

    saes: Text | list[Text] | None = None
    """The folder of one SAE, or a glob or list of several."""
    out: Text | None = None
    """The folder to write; of several SAEs each below it, by its folder's name."""

    def folders(self) -> dict[Path, Path]:
        """Find the folders that `saes` names, by the folder that each goes to; UserError where there is none."""
        if not self.out:
            raise UserError("out is not set: name the folder to write")
        if not self.saes:
            raise UserError("saes is not set: name the folder of an SAE, or a glob of several")
        out = Path(self.out)
        if isinstance(self.saes, str) and Path(self.saes).is_dir():
            return {Path(self.saes): out}
        patterns: Sequence[str] = [self.saes] if isinstance(self.saes, str) else self.saes
        targets: dict[Path, Path] = {}
        for pattern in patterns:
            folders = [Path(match) for match in expand_globs(pattern) if Path(match).is_dir()]
            if not folders:
                raise UserError(f"saes={pattern} matches no folder: fix the path")
            targets |= {folder: out / folder.name for folder in folders}
        if len(set(targets.values())) < len(targets):
            raise UserError("several folders of saes have one name and would be written to one place: take them apart")
        return targets


class ExportSettings(FolderSettings):
    """conf/export.yaml: trained SAEs to the folders of other tools."""

    to: Literal["saelens", "dictionary_learning", "sparsify", "circuit_tracer"] = "saelens"
    """The tool whose format is written; sparsify takes TopK alone, circuit_tracer all of a set of transcoders."""
    report: Text | None = None
    """The report.json of an evaluation, for the card; null: the held-out figures of the training."""


class ImportSettings(FolderSettings):
    """conf/adopt.yaml: SAEs of other tools to ours."""

    store: Text | None = None
    """The store of the activations that the SAE is of."""
    site: Text | None = None
    """The site in the store; null: as the folder says. Of a circuit-tracer set its kind alone: mlp_in."""
    target: Text | None = None
    """Of a transcoder, the site that it predicts; null: as the folder says. Of a circuit-tracer set its kind alone."""
