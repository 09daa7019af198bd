"""Crosscoders in an evaluation: their models, their error over all sites, and at which sites their latents write.

Each crosscoder is scored at each of its sites beside the SAEs of it (score.py). What is of all sites at once is here.
Letters: F latents, S sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.base.errors import UserError
from data.base.records import Json, diff_fields
from data.base.sites import Site
from data.store.store import Store
from evaluate.config import EvaluateSettings
from evaluate.forms import AtSite, form_of
from evaluate.inputs import SavedSAE, pinned
from harvest import lm
from train.sae.io import load
from train.sae.parts.sites import norms_by_site

ALONE_FROM = 0.9  # share of a latent's decoder norm from which on it counts as one site's alone
SHARED_FROM = 0.5  # of an even part: a latent whose share is at least that at every site counts as shared
SHARE_BINS = 20  # of the histogram of shares


def form_at_site(sae: SavedSAE, form: str) -> AtSite:
    """Load a crosscoder as it stands for the site that `sae` names."""
    assert sae.part is not None
    return AtSite(form_of(load(sae.folder), form), sae.part, [_name(sae, each) for each in sae.joined])


def _name(sae: SavedSAE, joined: Json) -> str:
    """Name a site as the rows of `sae`'s own store are named, those of another store apart."""
    own = joined["fingerprint"] == sae.of_site["fingerprint"]
    return str(joined["site"]) if own else f"{joined['site']} of {joined['store']}"


def sites_beside(saes: Sequence[SavedSAE]) -> list[Site]:
    """List the sites of the same store that the crosscoders among `saes` read."""
    return [
        Site.parse(joined["site"])
        for sae in saes
        for joined in sae.joined
        if joined["fingerprint"] == sae.of_site["fingerprint"]
    ]


class OtherModels:
    """The models of the other stores that crosscoders read, each loaded once."""

    def __init__(self, stores: Mapping[str, Store], settings: EvaluateSettings) -> None:
        self.stores, self.settings = stores, settings
        self._models: dict[str, Any] = {}

    def elsewhere(self, saes: Sequence[SavedSAE]) -> dict[str, tuple[Any, Site]]:
        """Give the model and site behind each name of another store's site that `saes` read."""
        found = {}
        for sae in saes:
            for joined in sae.joined:
                if joined["fingerprint"] != sae.of_site["fingerprint"]:
                    found[_name(sae, joined)] = (self._model(joined["fingerprint"]), Site.parse(joined["site"]))
        return found

    def _model(self, fingerprint: str) -> Any:
        if fingerprint not in self._models:
            store = self.stores[fingerprint]
            given = {"device": self.settings.device, "device_map": self.settings.device_map}
            settings = {**pinned(store)["model"], **given}
            if diff_fields(store.manifest.identity["model"], lm.identify(settings)):
                raise UserError(
                    f"the model of {store.path} is another than the one it was harvested from: restore it, or harvest "
                    "and train again"
                )
            self._models[fingerprint] = lm.load_model(settings)
        return self._models[fingerprint]


def require_no_crosscoder(saes: Sequence[SavedSAE], setting: str) -> None:
    """Raise UserError where a setting that is of SAEs of one site meets a crosscoder."""
    if crossing := [sae for sae in saes if sae.joined]:
        raise UserError(
            f"{setting} is of SAEs of one site, and {crossing[0].folder} is a crosscoder of {crossing[0].reads}: leave "
            f"{setting} out, or its folder"
        )


def crosscoder_entry(sae: SavedSAE, rows: Sequence[Json], totals: Sequence[tuple[float, float]]) -> Json:
    """Write one entry of the report's `crosscoders`.

    rows: of the tables of its sites, in their order. totals: the squared error and the squared deviation at each, in
    model units. `nmse` is over all sites, each in its normalised units as in the loss: a ratio of sums. A latent's
    share at a site is its decoder row's norm there over the sum of these norms, in normalised units too; the latents
    that fire on no token of the text are counted apart.
    """
    model = load(sae.folder)
    assert model.site_widths is not None
    weights = model.norm.scale.double().square().tolist()
    error = sum(weight * error for weight, (error, _) in zip(weights, totals, strict=True))
    deviation = sum(weight * deviation for weight, (_, deviation) in zip(weights, totals, strict=True))
    norms_SF = norms_by_site(model.W_dec.detach(), model.site_widths)
    share_SF = (norms_SF / norms_SF.sum(0).clamp_min(torch.finfo(norms_SF.dtype).tiny)).numpy()
    fires_F = np.array(rows[0]["l0"]["fired"]) > 0
    share_SF = share_SF[:, fires_F]
    only_S = (share_SF > ALONE_FROM).sum(1)
    shared = int((share_SF >= SHARED_FROM / len(share_SF)).all(0).sum())
    sites = [
        {
            "site": row["at"],
            "nmse": row["metrics"]["nmse"],
            "ce_increase": row["metrics"]["ce_increase"],
            "recovered_zero": row["metrics"]["recovered_zero"],
            "only": int(only),
            "share": float(share.mean()) if len(share) else None,
            "histogram": np.histogram(share, bins=SHARE_BINS, range=(0, 1))[0].tolist(),
        }
        for row, only, share in zip(rows, only_S, share_SF, strict=True)
    ]
    return {
        "folder": str(sae.folder),
        "name": f"{Path(sae.folder).name}: {rows[0]['variant']} of {sae.reads}",
        "latents": model.width,
        "silent": int((~fires_F).sum()),
        "shared": shared,
        "between": int(fires_F.sum()) - shared - int(only_S.sum()),
        "l0": rows[0]["metrics"]["l0"],
        "nmse": error / deviation,
        "sites": sites,
    }
