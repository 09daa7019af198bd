"""A page that shades a text of the user's by the latents that fire on it: `python -m evaluate.features text="..."`.

Letters: T tokens of the text with the BOS before it, N of them that an SAE reads, F latents, K latents that fire.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
from train.sae.base import SAE
from train.sae.io import load

OWN_TEXT_HTML = "text.html"


def make_own_text(settings: FeaturesSettings, trained: SavedSAE) -> Path:
    """Write the page of `settings.own_text` for one SAE; its path.

    Raises UserError where the text has no token, or more than a context of the store.
    """
    page, about = OwnTextReader(settings, trained).read(settings.own_text or "")
    return write_own_text(page, about, Path(settings.out))


class OwnTextReader:
    """One SAE and its language model, opened when the first text is read, which any number of texts are shown to."""

    def __init__(self, settings: FeaturesSettings, trained: SavedSAE) -> None:
        self.trained = trained
        ((self.store, _),) = group_by_store([trained], parse_location(settings.cache))
        self.model_settings = {
            **pinned(self.store)["model"],
            **{"device": settings.device, "device_map": settings.device_map},
        }

    @cached_property
    def tokenizer(self) -> Any:
        return lm.load_tokenizer(self.model_settings)

    @cached_property
    def model(self) -> Any:
        doing(f"loading {self.store.manifest.name}")
        return lm.load_model(self.model_settings)

    @cached_property
    def sae(self) -> SAE:
        return load(self.trained.folder).eval().to(lm.input_device(self.model))

    @property
    def about(self) -> Json:
        """Return what stands at the top of a page, but what is of its text."""
        return {
            **{"variant": self.trained.config["variant"], "width": self.sae.width, "folder": str(self.trained.folder)},
            **{"site": self.trained.site, "model": self.store.manifest.name},
        }

    def read(self, text: str) -> tuple[Json, Json]:
        """Return what fires on each token of a text, and what stands at the top of its page.

        The text is read as in the store: with the BOS of its packing, special tokens left out unless the store has
        them. Raises UserError where it has no token, or more than a context of the store.
        """
        ids_T, read_T = encode_as_stored(text, self.tokenizer, self.store)
        site, sae = Site.parse(self.trained.site), self.sae
        ids_BT = torch.from_numpy(ids_T)[None]
        x_TD = run_to(self.model, [site], ids_BT.to(lm.input_device(self.model)))[str(site)][0].float()
        with torch.inference_mode():
            f_NF = sae.encode(x_TD[torch.from_numpy(read_T).to(x_TD.device)].to(sae.W_dec.device)).cpu()
        fired_K = (f_NF > 0).any(0).nonzero()[:, 0]
        raised = self._raised(fired_K)
        tokens = Strings(Words(self.tokenizer).text)
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
        return page, {**self.about, "l0": float((f_NF > 0).sum(1).float().mean())}

    def _raised(self, fired_K: Tensor) -> NDArray[np.int64] | None:
        """Return the tokens whose logits each of these latents raises most [K, LABELS]; None where none are known."""
        target = Site.parse(self.trained.target)
        lens = weights.find_lens(self.model, self.sae.d_out) if target.kind in STREAM_KINDS else None
        if lens is None or not len(fired_K):
            return None
        vocabulary = min(len(self.tokenizer), self.model.config.get_text_config().vocab_size)
        rows = self.sae.W_dec.detach()[fired_K.to(self.sae.W_dec.device)]
        tokens_KL: NDArray[np.int64] = weights.ends(lens, rows, vocabulary, LABELS, lambda count: None)[0][0].numpy()
        return tokens_KL


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
    write_atomic(out / OWN_TEXT_HTML, own_text_html(page, about))
    return out / OWN_TEXT_HTML


def own_text_html(page: Mapping[str, Any] | None, about: Json, form: Mapping[str, str] | None = None) -> str:
    """Render the page of a text, or of none yet.

    form: with a form to type in, as a server shows it: the `text` in it and what to `say` of it, if anything.
    """
    script = asset("text.js")
    return render(
        "text.html", page=None if page is None else dict(page), about=about, form=form,
        style=asset("base.css") + asset("text.css"), script=script, script_digest=script_hash(script),
    )  # fmt: skip
