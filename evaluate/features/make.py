"""The feature pages of one SAE: its LM and held-out text, one pass over it, then the pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.base.errors import UserError
from data.base.location import parse_location
from data.base.progress import progress
from data.base.records import Json
from data.base.sites import STREAM_KINDS, Site
from data.store.store import Store
from evaluate.config import FeaturesSettings, HeldoutSettings
from evaluate.inputs import HeldoutText, SavedSAE, find_saes, group_by_store, open_text
from evaluate.massive import ScoredText
from train.sae.io import load

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from evaluate.features.collect import Collector
    from evaluate.features.pages import Latents
    from train.sae.base import SAE

OTHER_FOLDER = "other"  # the folder of the pages of the SAE compared with
SHARED = tuple(name for name in HeldoutSettings.model_fields if name not in ("out", "seed"))


def one_sae(folder: str | None, setting: str = "folder") -> SavedSAE:
    """Find the SAE that `setting` names; UserError where there is none, or several."""
    if not folder:
        raise UserError(
            f"{setting} is empty: name that of one trained SAE, as in {setting}=outputs/demo/saes/sae-batchtopk"
        )
    saes = find_saes(folder, setting)
    if len(saes) > 1:
        raise UserError(f"{setting}={folder} holds {len(saes)} SAEs: name the folder of one, such as {saes[0].folder}")
    return saes[0]


def encoded_contexts(sae: SAE, text: HeldoutText, site: Site) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Read the held-out contexts as far as the site, in order and some at a time: the number of the first, which of
    their tokens are read [B, T], and the latents on those [N, F]."""
    import torch

    from evaluate.score import ACTIVATIONS_AT_ONCE
    from harvest.hooks import run_to

    # Contexts whose [N, F] latents are in memory at a time.
    at_once = max(1, ACTIVATIONS_AT_ONCE // (sae.width * text.packed.contexts.shape[1]))
    for batch in text.batches():
        x_BTD = run_to(text.model, [site], batch.ids_BT)[str(site)]
        for first in range(0, len(batch.numbers), at_once):
            keep_BT = batch.keep_BT[first : first + at_once]
            x_ND = x_BTD[first : first + at_once][keep_BT.to(x_BTD.device)].float()
            with torch.inference_mode():
                f_NF = sae.to(x_ND.device).encode(x_ND)
            yield batch.numbers.start + first, keep_BT.cpu(), f_NF


def collect(sae: SAE, text: HeldoutText, site: Site, settings: FeaturesSettings) -> Collector:
    """Read the held-out contexts once, as far as the site, and gather what each latent fires on."""
    from evaluate.features.collect import Collector

    collector = Collector(
        sae.width,
        top=settings.top,
        sample=settings.sample,
        before=settings.before,
        after=settings.after,
        seed=settings.seed,
    )
    total = int(text.packed.keep.sum())
    with progress(f"features at {site}", total, "tokens", lines=5) as bar:
        for first, keep_BT, f_NF in encoded_contexts(sae, text, site):
            collector.update(f_NF, keep_BT, first)
            bar.update(len(f_NF))
    return collector


def describe_latents(
    sae: SAE,
    text: HeldoutText,
    target: Site,
    collector: Collector,
    settings: FeaturesSettings,
    other: OtherPages | None = None,
) -> Latents:
    """Put what was collected together with what the weights say; `target` is the site that the decoder writes to."""
    from evaluate.features import weights
    from evaluate.features.pages import Latents, OtherSAE, Words

    W_dec_FD = sae.W_dec.detach()
    vocabulary = min(len(text.tokenizer), text.model.config.get_text_config().vocab_size)
    # A module's own output need not be added to the residual stream, and what a module reads is not, so only the named
    # points of the stream have a direct path.
    lens = weights.find_lens(text.model, sae.d_out) if target.kind in STREAM_KINDS else None
    reader = None
    if sae.transcodes:
        assert sae.site is not None, "a transcoder from a folder has its site"
        reader = weights.find_input_lens(text.model, Site.parse(sae.site), sae.d_in)
    raised, lowered, reads, beside = None, None, None, None
    total = sae.width * (1 + (lens is not None) + (reader is not None) + (other is not None))
    with progress("decoder rows", total, "rows", lines=5) as bar:
        near = as_arrays(weights.neighbours(W_dec_FD, settings.neighbours, bar.update))
        if lens:
            raised, lowered = map(as_arrays, weights.ends(lens, W_dec_FD, vocabulary, settings.logits, bar.update))
        if reader:
            # In model units, so that the numbers are in those of the activations.
            encoder_FD = sae.W_enc_FD.detach() * sae.norm.scale
            most, least = map(as_arrays, weights.ends(reader, encoder_FD, vocabulary, settings.logits, bar.update))
            reads = (most, least)
        if other is not None:
            rows = weights.neighbours(W_dec_FD, settings.neighbours, bar.update, other.sae.W_dec.detach())
            beside = OtherSAE(other.name, OTHER_FOLDER, as_arrays(rows), other.peaks)
    return Latents(
        collector,
        text.packed,
        Words(text.tokenizer),
        near,
        raised,
        lowered,
        tuple(settings.quantiles),
        settings.at_a_quantile,
        collector.together.neighbours(settings.neighbours),
        beside,
        reads,
    )


def as_arrays(ends: tuple[Tensor, Tensor]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the ids and values as arrays."""
    return ends[0].numpy(), ends[1].numpy()


def make(config: Mapping[str, Any]) -> Path:
    """Write the pages that a resolved configuration names (evaluate/config.py); the path of the page to open."""
    settings = FeaturesSettings.of(config)
    if settings.own_text is None:
        return make_pages(settings)
    from evaluate.features.own_text import make_own_text

    return make_own_text(settings, one_sae(settings.folder))


def make_pages(settings: FeaturesSettings, report: str | None = None) -> Path:
    """Write the pages of one SAE, and of the one it is compared with; the path of `index.html`.

    report: where the report is that they stand beside, as their links have it.
    """
    trained = one_sae(settings.folder)
    compared = None if settings.compare is None else one_sae(settings.compare, "compare")
    saes = [trained] if compared is None else [trained, compared]
    stores = group_by_store(saes, parse_location(settings.cache))
    if len(stores) > 1 or len(stores[0][1]) > 1:
        raise UserError(f"compare={settings.compare} is of another store or site: name an SAE of the same one")
    ((store, by_site),) = stores
    (target,) = map(Site.parse, by_site)
    scored = ScoredText.of(open_text(store, settings.model_dump()), saes)
    other = None
    if compared is not None:
        sae = load(compared.folder).eval()
        collector = collect(sae, scored.text, Site.parse(compared.site), settings)
        latents = describe_latents(sae, scored.text, target, collector, settings)
        about = describe_pages(compared, store, scored, latents, settings)
        peaks = write(latents, about, Path(settings.out) / OTHER_FOLDER)
        other = OtherPages(sae, f"{compared.config['variant']} in {compared.folder.name}", peaks)
    sae = load(trained.folder).eval()
    collector = collect(sae, scored.text, Site.parse(trained.site), settings)
    latents = describe_latents(sae, scored.text, target, collector, settings, other)
    about = describe_pages(trained, store, scored, latents, settings)
    write(latents, {**about, "report": report}, Path(settings.out))
    return Path(settings.out) / "index.html"


@dataclass(frozen=True)
class OtherPages:
    """The SAE that pages compare with: its weights, its name, and the tokens that each latent fires on most."""

    sae: SAE
    name: str
    peaks: list[list[int]]


def write(latents: Latents, about: Json, out: Path) -> list[list[int]]:
    """Write pages; return the tokens that each latent fires on most."""
    from evaluate.features import pages

    width = latents.collector.width
    with progress("pages", width, "pages", lines=5) as bar:
        pages.write_pages(latents, about, out, bar.update)
    every = pages.Pieces(latents)
    return [every.peak_tokens(latent) for latent in range(width)]


def describe_pages(
    trained: SavedSAE, store: Store, scored: ScoredText, latents: Latents, settings: FeaturesSettings
) -> Json:
    """Return what stands at the top of the pages."""
    collector = latents.collector
    # Of a transcoder alone, whose input and output are two places of the model.
    reads = {"reads": latents.reads is not None} if trained.transcodes else {}
    return {
        "variant": trained.config["variant"],
        "width": collector.width,
        "site": f"{trained.site} to {trained.target}" if trained.transcodes else trained.site,
        "model": store.manifest.name,
        "store": store.path.name,
        "fingerprint": store.manifest.fingerprint,
        "folder": str(trained.folder),
        "tokens": collector.tokens,
        "special": bool(store.manifest.settings["packing"]["keep_special"]),
        "massive": scored.left_out,
        "contexts": len(scored.text.packed.contexts),
        "silent": int((collector.fired_F == 0).sum()),
        "sample": settings.sample,
        "seed": settings.seed,
        "logits": latents.raised is not None,
        **reads,
        "together": collector.together.share,
        "report": None,
        "settings": {"settings": trained.config["settings"], "training": trained.config.get("training", {})},
    }


def make_for(evaluation: HeldoutSettings, folder: str) -> Path:
    """Write the pages of one SAE beside a report, from the same held-out text; all else as its defaults have it."""
    shared = {name: getattr(evaluation, name) for name in SHARED}
    settings = FeaturesSettings(**shared, folder=folder, out=str(Path(evaluation.out) / "features"))
    return make_pages(settings, report="../report.html")
