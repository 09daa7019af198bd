"""A page that shades a text of the user's by the latents that fire on it: `python -m evaluate.features text="..."`.

Letters: T tokens of the text with the BOS before it, N of them that an SAE reads, F latents, K latents that fire.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.base.errors import UserError
from data.base.files import write_atomic
from data.base.location import parse_location
from data.base.logs import doing
from data.base.records import Json
from data.base.sites import STREAM_KINDS, Site
from data.store.store import Store
from evaluate.config import FeaturesSettings
from evaluate.features import weights
from evaluate.features.pages import LABELS, Strings, Words, short
from evaluate.inputs import SavedSAE, group_by_store, pinned
from evaluate.report.render import asset, render, script_hash
from harvest import lm
from harvest.hooks import run_to
from harvest.packing import Packing, contexts_of_text
from train.sae.io import load

OWN_TEXT_HTML = "text.html"


def make_own_text(settings: FeaturesSettings, trained: SavedSAE) -> Path:
    """Write the page of `settings.own_text` for one SAE; its path.

    The text is read as in the store: with the BOS of its packing, special tokens left out unless the store has them.
    Raises UserError where it has no token, or more than a context of the store.
    """
    ((store, _),) = group_by_store([trained], parse_location(settings.cache))
    site, target = Site.parse(trained.site), Site.parse(trained.target)
    text = settings.own_text or ""
    model_settings = {
        **pinned(store)["model"],
        **{"device": settings.device, "device_map": settings.device_map},
    }
    tokenizer = lm.load_tokenizer(model_settings)
    ids_T, read_T = encode_as_stored(text, tokenizer, store)
    doing(f"loading {store.manifest.name} to read {len(ids_T)} tokens")
    model = lm.load_model(model_settings)
    sae = load(trained.folder).eval()
    x_TD = run_to(model, [site], torch.from_numpy(ids_T)[None].to(lm.input_device(model)))[str(site)][0].float()
    with torch.inference_mode():
        f_NF = sae.to(x_TD.device).encode(x_TD[torch.from_numpy(read_T).to(x_TD.device)]).cpu()
    fired_K = (f_NF > 0).any(0).nonzero()[:, 0]
    lens = weights.find_lens(model, sae.d_out) if target.kind in STREAM_KINDS else None
    raised = None
    if lens is not None and len(fired_K):
        vocabulary = min(len(tokenizer), model.config.get_text_config().vocab_size)
        rows = sae.W_dec.detach()[fired_K.to(sae.W_dec.device)]
        raised = weights.ends(lens, rows, vocabulary, LABELS, lambda count: None)[0][0].numpy()
    tokens = Strings(Words(tokenizer).text)
    positions = np.flatnonzero(read_T)
    latents = [_latent(int(latent), f_NF[:, latent].numpy(), positions) for latent in fired_K]
    for place, record in enumerate(latents):
        record["r"] = [] if raised is None else tokens.numbers(raised[place].tolist())
    page = {
        "ids": tokens.numbers(ids_T.tolist()),
        "read": positions.tolist(),
        "latents": latents,
        "tokens": tokens.texts,
    }
    about = {
        **{"variant": trained.config["variant"], "width": sae.width, "folder": str(trained.folder)},
        **{"site": str(site), "model": store.manifest.name, "l0": float((f_NF > 0).sum(1).float().mean())},
    }
    return write_own_text(page, about, Path(settings.out))


def encode_as_stored(text: str, tokenizer: Any, store: Store) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the token ids [T] of a text as the store's packing has them, and which of them the SAE reads [T].

    Raises UserError where there is none, or more than one context of them.
    """
    packing = Packing.of(store.manifest.settings["packing"])
    contexts = list(contexts_of_text(text, tokenizer, packing))
    if not any(read_T.any() for _, read_T in contexts):
        raise UserError("text holds no token that the SAE would read: give some words")
    if len(contexts) > 1:
        raise UserError(
            f"text fills {len(contexts):,} contexts of {packing.context:,} tokens and the page shows one: give a "
            "shorter text"
        )
    return contexts[0]


def _latent(latent: int, f_N: NDArray[np.float32], positions: NDArray[np.int64]) -> Json:
    """Return where a latent fires: its number `i`, and positions and activations `a`."""
    active = np.flatnonzero(f_N > 0)
    return {"i": latent, "a": [pair for at in active.tolist() for pair in (int(positions[at]), short(float(f_N[at])))]}


def write_own_text(page: Mapping[str, Any], about: Json, out: Path) -> Path:
    """Write `text.html` into a folder; its path."""
    out.mkdir(parents=True, exist_ok=True)
    script = asset("text.js")
    html = render(
        "text.html", page=dict(page), about=about, style=asset("base.css") + asset("text.css"), script=script,
        script_digest=script_hash(script),
    )  # fmt: skip
    write_atomic(out / OWN_TEXT_HTML, html)
    return out / OWN_TEXT_HTML
