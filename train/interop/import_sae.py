"""python -m train.interop.import_sae saes=FOLDER store=outputs/cache/<store> out=adopted: other tools' SAEs as ours"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from data.base import cli
from data.base.errors import UserError
from data.base.sites import Site
from data.store.manifest import TRAIN
from train.interop.config import ImportSettings, refuse_full

if TYPE_CHECKING:
    from torch import Tensor

    from data.store.store import Store

_ROWS = 32_768  # that token-normalised moments are measured on


def adopt(folder: Path, store: Store, site: str | None, out: Path) -> None:
    """Write what SAELens, dictionary_learning or sparsify left in `folder` as an SAE of `site` of `store`.

    Its function stays what it was, in model units (input_norm none, or token for layer_norm). Vx and E||x'||^2, which
    only a training that goes on uses, are the store's.
    """
    from train.interop import format_of
    from train.plan import origin
    from train.sae import save

    refuse_full(out)
    known = format_of(folder)
    foreign = known.read(folder)
    sae, name = foreign.sae, str(Site.parse(_site(folder, site or foreign.site)))
    if name not in (sites := store.sites(TRAIN)):
        raise UserError(f"{store.path} has no site {name}, only {', '.join(sites)}: name another store, or harvest it")
    stats = store.stats(TRAIN, name)
    if sae.d_in != (width := store.decoder(TRAIN, name).width):
        raise UserError(f"{folder} is of {sae.d_in} entries and {name} in {store.path} has {width}: name its own site")
    if sae.input_norm == "token":
        xn_ND = sae.norm.normalise(_rows(store, name)).double()
        sae.mean_sq.fill_(float(xn_ND.square().sum(1).mean()))
        sae.variance.fill_(float(xn_ND.var(0, correction=0).sum()))
    else:
        sae.mean_sq.fill_(stats.mean_sq_norm)
        sae.variance.fill_(stats.variance)
    save(sae, out, {**origin(store, name), "adopted": {"format": known.name, "from": folder.name}})


def _rows(store: Store, site: str) -> Tensor:
    """Read a sample of the training rows, in model units."""
    from data.loading.loader import ActivationLoader
    from data.loading.reader import open_reader

    reader = open_reader(store, TRAIN, site)
    loader = ActivationLoader(reader, batch=1)
    rows: Tensor = store.decoder(TRAIN, site)(loader.sample(min(_ROWS, int(reader.sizes.sum())))).float()
    return rows


def _site(folder: Path, named: str | None) -> str:
    if named is None:
        raise UserError(f"{folder} does not say which site it is of: give site=<site>")
    return named


def main(config: DictConfig) -> None:
    """Run the command from Hydra's configuration."""
    from data.store.store import Store

    settings = ImportSettings.of(cli.stage_settings(config, "adopt"))
    if not settings.store:
        raise UserError("store is not set: name the folder of the activations that the SAE is to be scored on")
    folders = settings.folders()
    store = Store.open(settings.store)
    for folder, out in folders.items():
        adopt(folder, store, settings.site, out)
        print(f"{folder} -> {out}")


if __name__ == "__main__":
    cli.run(main, "adopt")
