"""python -m train.interop.import_sae saes=FOLDER store=outputs/cache/<store> out=adopted: other tools' SAEs as ours"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from data.base import cli
from data.base.errors import UserError
from data.base.files import refuse_full
from data.base.sites import Site
from data.store.manifest import TRAIN
from train.interop.config import ImportSettings

if TYPE_CHECKING:
    from torch import Tensor

    from data.store.store import Store
    from train.interop.foreign import Foreign

_ROWS = 32_768  # that token-normalised moments are measured on
_BEFORE_WEIGHT = re.compile(r"\.ln[12]\.hook_normalized$")


def adopt(folder: Path, store: Store, site: str | None, out: Path, target: str | None = None) -> None:
    """Write what SAELens, dictionary_learning or sparsify left in `folder` as an SAE of `site` of `store`.

    A transcoder becomes one from `site` to `target`. Its function stays what it was, in model units (input_norm none,
    or token for layer_norm). Vx and E||x'||^2, which only a training that goes on uses, are the store's.
    """
    from train.interop import format_of

    refuse_full(out)
    known = format_of(folder)
    _adopt(known.read(folder), known.name, folder, store, (site, target), out)


def adopt_set(folder: Path, store: Store, site: str | None, out: Path, target: str | None = None) -> list[Path]:
    """Write each transcoder of a circuit-tracer set as one of ours, into `layer_<n>` below `out`; those folders.

    `site` and `target` are kinds, taken at each layer: `mlp_in`, `mlp_out`.
    """
    from train.interop import circuit_tracer

    refuse_full(out)
    folders = []
    for layer, foreign in circuit_tracer.read(folder).items():
        at_layer = [None if kind is None else f"{kind}.{layer}" for kind in (site, target)]
        folders.append(out / f"layer_{layer}")
        _adopt(foreign, "circuit-tracer", folder, store, (at_layer[0], at_layer[1]), folders[-1])
    return folders


def _adopt(
    foreign: Foreign, tool: str, folder: Path, store: Store, places: tuple[str | None, str | None], out: Path
) -> None:
    """Write one SAE; `places` are the site and the target that were given, None for what the folder says."""
    from train.plan import origin
    from train.sae import save

    sae = foreign.sae
    name = _in_store(store, _site(folder, foreign.site, places[0], "site"))
    if sae.d_in != (width := store.decoder(TRAIN, name).width):
        raise UserError(f"{folder} is of {sae.d_in} entries and {name} in {store.path} has {width}: name its own site")
    target = None
    if sae.transcodes:
        target = _in_store(store, _site(folder, foreign.target, places[1], "target"))
        if sae.d_out != (width := store.decoder(TRAIN, target).width):
            raise UserError(
                f"{folder} predicts {sae.d_out} entries and {target} in {store.path} has {width}: name its own target"
            )
    elif places[1] is not None:
        raise UserError(f"{folder} is no transcoder, and target={places[1]} is given: leave it out")
    stats = store.stats(TRAIN, target or name)
    if sae.input_norm == "token":
        xn_ND = sae.norm.normalise(_rows(store, name)).double()
        sae.mean_sq.fill_(float(xn_ND.square().sum(1).mean()))
        sae.variance.fill_(float(xn_ND.var(0, correction=0).sum()))
    else:
        sae.mean_sq.fill_(stats.mean_sq_norm)
        sae.variance.fill_(stats.variance)
    save(sae, out, {**origin(store, name, target), "adopted": {"format": tool, "from": folder.name}})


def _in_store(store: Store, site: str) -> str:
    """Give the site's name; UserError where the store has none of it."""
    name = str(Site.parse(site))
    if name not in (sites := store.sites(TRAIN)):
        raise UserError(f"{store.path} has no site {name}, only {', '.join(sites)}: name another store, or harvest it")
    return name


def _rows(store: Store, site: str) -> Tensor:
    """Read a sample of the training rows, in model units."""
    from data.loading.loader import ActivationLoader
    from data.loading.reader import open_reader

    reader = open_reader(store, TRAIN, site)
    loader = ActivationLoader(reader, batch=1)
    rows: Tensor = store.decoder(TRAIN, site)(loader.sample(min(_ROWS, int(reader.sizes.sum())))).float()
    return rows


def _site(folder: Path, named: str | None, given: str | None, setting: str) -> str:
    """Choose what is given, else what the folder says; UserError where neither is, and where no site here is that."""
    if named is not None and _BEFORE_WEIGHT.search(named):
        # What the user gives instead would be another tensor, and the numbers wrong without a word.
        raise UserError(
            f"{folder} reads {named}, which is before the norm's weight, and no site here is: divide the rows of W_enc "
            "(and the columns of W_skip) by that weight, and name what it then reads blocks.<layer>.mlp.hook_in"
        )
    if given is None and named is None:
        raise UserError(f"{folder} does not say which {setting} it is of: give {setting}=<site>")
    return given or named or ""


def main(config: DictConfig) -> None:
    """Run the command from Hydra's configuration."""
    from data.store.store import Store

    settings = ImportSettings.of(cli.stage_settings(config, "adopt"))
    if not settings.store:
        raise UserError("store is not set: name the folder of the activations that the SAE is to be scored on")
    from train.interop.circuit_tracer import is_set

    folders = settings.folders()
    store = Store.open(settings.store)
    for folder, out in folders.items():
        if is_set(folder):
            for number, layer in enumerate(adopt_set(folder, store, settings.site, out, settings.target)):
                print(f"{folder}, layer {number} -> {layer}")
        else:
            adopt(folder, store, settings.site, out, settings.target)
            print(f"{folder} -> {out}")


if __name__ == "__main__":
    cli.run(main, "adopt")
