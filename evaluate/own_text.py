"""One SAE on a text of one's own: what its latents are on each token, and what a latent does to a continuation.

The language model, the packing and the site are those of the SAE's record (config.json), so tokens, BOS and contexts
are what they were in training. Letters: T tokens of a context, N tokens of the text, D width of the site, F latents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from data.base.errors import UserError
from data.base.records import Json
from data.base.sites import Site
from evaluate.features.pages import Words
from harvest.hooks import replace, run_to
from harvest.lm import input_device, load_model, load_tokenizer
from harvest.packing import Packing, contexts_of_text
from train.sae.base import SAE
from train.sae.io import load


@dataclass(frozen=True)
class EncodedText:
    """The tokens of a text and the SAE's latents on them; special tokens are read, but are not among them.

    tokens: ids [N]. strings: their texts. latents: f [N, F]. x: the activations [N, D] that f is of, in model units.
    """

    tokens: Int64[Tensor, " N"]
    strings: list[str]
    latents: Float[Tensor, "N F"]
    x: Float[Tensor, "N D"]

    def strongest(self, count: int = 10) -> list[tuple[int, float, str]]:
        """List the latents with the largest activations in the text: (latent, activation, the token it is on)."""
        largest_F, at_F = self.latents.max(dim=0)
        chosen = largest_F.topk(min(count, len(largest_F))).indices.tolist()
        return [(f, float(largest_F[f]), self.strings[int(at_F[f])]) for f in chosen if largest_F[f] > 0]


def encode_text(sae: SAE | str | Path, text: str, *, device: str = "auto") -> EncodedText:
    """Compute the latents of `sae`, or of the SAE in a folder, on every token of `text`.

    The model stays loaded for the next call. Raises UserError where the SAE has no record of its model, and for a text
    without tokens.
    """
    opened = _opened(sae, device)
    contexts = opened.contexts(text)
    if not any(bool(keep_T.any()) for _, keep_T in contexts):
        raise UserError("the text has no tokens: give at least a word")
    ids, rows = [], []
    for ids_T, keep_T in contexts:
        x_TD = run_to(opened.model, [opened.site], ids_T[None].to(opened.device))[str(opened.site)][0]
        ids.append(ids_T[keep_T])
        rows.append(x_TD.cpu()[keep_T].float())
    tokens_N, x_ND = torch.cat(ids), torch.cat(rows)
    words = Words(opened.tokenizer)
    f_NF = opened.sae.encode(x_ND.to(opened.sae.W_dec.device)).cpu()
    return EncodedText(tokens_N, [words.text(int(token)) for token in tokens_N], f_NF, x_ND)


def steer_text(
    sae: SAE | str | Path, prompt: str, latent: int, strength: float, *, tokens: int = 40, device: str = "auto"
) -> str:
    """Continue `prompt` by the likeliest tokens with one latent's activation raised by `strength` on every token.

    At the site x becomes x + strength * (the latent's row of the decoder, in model units); 0 leaves the model as it is.
    Raises UserError for a latent that the SAE does not have, and where prompt and continuation exceed a context.
    """
    opened = _opened(sae, device)
    if opened.sae.transcodes:
        raise UserError("steer_text takes an SAE, and this is a transcoder, which reads one site and writes another")
    if not 0 <= latent < opened.sae.width:
        raise UserError(f"latent={latent} is none of the SAE's: choose one from 0 to {opened.sae.width - 1}")
    contexts = opened.contexts(prompt)
    given = sum(len(ids_T) for ids_T, _ in contexts)
    if len(contexts) != 1 or given + tokens > opened.packing.context:
        raise UserError(
            f"a prompt of {given} tokens and {tokens} more do not fit a context of {opened.packing.context}, or there "
            "is no prompt: give a shorter one, or fewer tokens"
        )
    ((ids_T, keep_T),) = contexts

    def push(x_BTD: Tensor) -> Tensor:
        # Rows that the SAE was never trained on (BOS and the like) stay as they are.
        moved_BTD = x_BTD.clone()
        kept_BT = keep_T[None].to(x_BTD.device)
        x_ND = x_BTD[kept_BT].float().to(opened.sae.W_dec.device)
        f_NF = torch.zeros(len(x_ND), opened.sae.width, device=x_ND.device)
        before_ND = opened.sae.decode(f_NF, x_ND)
        f_NF[:, latent] = strength
        step_ND = opened.sae.decode(f_NF, x_ND) - before_ND
        moved_BTD[kept_BT] = (x_ND + step_ND).to(x_BTD.device, x_BTD.dtype)
        return moved_BTD

    with torch.inference_mode(), replace(opened.model, opened.site, push):
        for _ in range(tokens):
            logits_V = opened.model(input_ids=ids_T[None].to(opened.device), use_cache=False).logits[0, -1]
            ids_T = torch.cat([ids_T, logits_V.argmax().cpu()[None]])
            keep_T = torch.cat([keep_T, torch.ones(1, dtype=torch.bool)])
    return str(opened.tokenizer.decode(ids_T[given:].tolist()))


@dataclass(frozen=True)
class _Opened:
    """An SAE with the language model that it is of."""

    sae: SAE
    site: Site
    model: Any
    tokenizer: Any
    packing: Packing

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    def contexts(self, text: str) -> list[tuple[Int64[Tensor, " T"], Bool[Tensor, " T"]]]:
        """Cut a text into contexts: token ids [T], and which of them are rows of the SAE [T]."""
        cut = contexts_of_text(text, self.tokenizer, self.packing)
        return [(torch.from_numpy(ids_T), torch.from_numpy(keep_T)) for ids_T, keep_T in cut]


def _opened(sae: SAE | str | Path, device: str) -> _Opened:
    """Open the model that the SAE's record names."""
    loaded = sae if isinstance(sae, SAE) else load(sae)
    record = loaded.record or {}
    if missing := [name for name in ("site", "model", "packing") if not record.get(name)]:
        raise UserError(f"the SAE has no record of its {missing[0]}: load it with train.sae.load from its folder")
    model, tokenizer = _model(json.dumps({**record["model"], "device": device}, sort_keys=True))
    return _Opened(loaded, Site.parse(record["site"]), model, tokenizer, Packing.of(record["packing"], "packing"))


@lru_cache(maxsize=1)
def _model(settings: str) -> tuple[Any, Any]:
    """Load the model and tokenizer of the settings, as JSON; the last one stays, as a notebook tries many texts."""
    given: Json = json.loads(settings)
    return load_model(given), load_tokenizer(given)
