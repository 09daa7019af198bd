"""`python -m evaluate.features`: which SAE, its LM and held-out text, one pass over it, then the pages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from data.base.cli import CONF
from data.base.errors import UserError
from data.base.location import parse_location
from data.base.settings import whole
from data.base.sites import Site
from evaluate.run import SavedSAE, Text, find_saes, group_by_store, open_text, pinned
from harvest import lm
from train.sae.io import load

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from evaluate.features.collect import Collector
    from evaluate.features.pages import Latents
    from train.sae.base import SAE

COUNTS = {
    **{"tokens": 1, "seed": 0, "top": 1, "sample": 1, "at_a_quantile": 1},
    **{"before": 0, "after": 0, "logits": 1, "neighbours": 1},
}  # the least each may be


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, counts as whole numbers; UserError for what they cannot be."""
    counts: dict[str, Any] = {name: whole(config, name, least) for name, least in COUNTS.items()}
    if config["lm_batch"] is not None:
        counts["lm_batch"] = whole(config, "lm_batch", 1)
    quantiles = config["quantiles"]
    fit = isinstance(quantiles, list) and all(isinstance(q, int | float) and 0 <= q <= 1 for q in quantiles)
    if not fit or sorted(set(quantiles), reverse=True) != quantiles:
        raise UserError(f"quantiles={quantiles} must be falling numbers from 1 to 0, as in [0.9,0.75,0.5,0.25]")
    return {**config, **counts}


def one_sae(folder: Any) -> SavedSAE:
    """The SAE that was named; UserError where there is none, or several."""
    if not folder:
        raise UserError("folder is empty: name that of one trained SAE, as in folder=outputs/demo/saes/sae-batchtopk")
    found = find_saes(str(folder))
    if len(found) > 1:
        raise UserError(f"folder={folder} holds {len(found)} SAEs: name the folder of one, such as {found[0].folder}")
    return found[0]


def collect(sae: SAE, text: Text, site: Site, config: Mapping[str, Any], size: int) -> Collector:
    """One pass over the held-out contexts, `size` of them in the LM at a time; ends after the site."""
    import torch
    from tqdm import tqdm

    from evaluate.features.collect import Collector
    from evaluate.score import ACTIVATIONS_AT_ONCE
    from harvest.hooks import run_to

    contexts, keep = torch.from_numpy(text.packed.contexts), torch.from_numpy(text.packed.keep)
    found = Collector(sae.width, **{name: config[name] for name in ("top", "sample", "before", "after", "seed")})
    device = next(text.model.parameters()).device
    at_once = max(1, ACTIVATIONS_AT_ONCE // (sae.width * contexts.shape[1]))  # contexts whose activations are held
    with tqdm(total=int(keep.sum()), unit="tok", unit_scale=True, desc=f"features at {site}", mininterval=1.0) as bar:
        for first in range(0, len(contexts), size):
            ids_BT = contexts[first : first + size].long().to(device)
            x_BTD = run_to(text.model, [site], ids_BT)[str(site)]
            for at in range(0, len(ids_BT), at_once):
                keep_BT = keep[first + at : first + min(at + at_once, len(ids_BT))]
                x_ND = x_BTD[at : at + at_once][keep_BT.to(x_BTD.device)].float()
                with torch.inference_mode():
                    f_NF = sae.to(x_ND.device).encode(x_ND)
                found.update(f_NF, keep_BT, first + at)
                bar.update(len(x_ND))
    return found


def describe(sae: SAE, text: Text, tokenizer: Any, site: Site, found: Collector, config: Mapping[str, Any]) -> Latents:
    """What was collected, with what the weights say."""
    from tqdm import tqdm

    from evaluate.features import weights
    from evaluate.features.pages import Latents, Words

    W_dec_FD = sae.W_dec.detach()
    vocabulary = min(len(tokenizer), text.model.config.get_text_config().vocab_size)
    # A module's own output need not be added to the residual stream, so only the named points have a direct path.
    lens = None if site.path is not None else weights.find_lens(text.model, sae.d_in)
    with tqdm(total=sae.width * (2 if lens else 1), unit="row", desc="decoder rows", mininterval=1.0) as bar:
        near = numpy(weights.neighbours(W_dec_FD, config["neighbours"], bar.update))
        ends = weights.ends(lens, W_dec_FD, vocabulary, config["logits"], bar.update) if lens else None
    raised, lowered = map(numpy, ends) if ends else (None, None)
    quantiles = tuple(config["quantiles"])
    return Latents(found, text.packed, Words(tokenizer), near, raised, lowered, quantiles, config["at_a_quantile"])


def numpy(ends: tuple[Tensor, Tensor]) -> tuple[NDArray[Any], NDArray[Any]]:
    return ends[0].numpy(), ends[1].numpy()


def make(config: Mapping[str, Any]) -> Path:
    """Write the pages a resolved configuration asks for; the path of `index.html`."""
    config = checked(config)
    trained = one_sae(config["folder"])
    ((store, by_site),) = group_by_store([trained], parse_location(config["cache"]))
    (site,) = map(Site.parse, by_site)
    sae = load(trained.folder).eval()
    text = open_text(store, config)
    tokenizer = lm.load_tokenizer(pinned(store)["model"])
    from tqdm import tqdm

    from evaluate.features import pages

    found = collect(sae, text, site, config, config["lm_batch"] or store.manifest.identity["lm_batch"])
    latents = describe(sae, text, tokenizer, site, found, config)
    about = {
        "variant": trained.config["variant"],
        "width": sae.width,
        "site": str(site),
        "model": store.manifest.name,
        "store": store.path.name,
        "fingerprint": store.manifest.fingerprint,
        "folder": str(trained.folder),
        "tokens": found.tokens,
        "special": bool(store.manifest.settings["packing"]["keep_special"]),
        "contexts": len(text.packed.contexts),
        "silent": int((found.fired_F == 0).sum()),
        "sample": config["sample"],
        "seed": config["seed"],
        "logits": latents.raised is not None,
        "settings": {"settings": trained.config["settings"], "training": trained.config.get("training", {})},
    }
    with tqdm(total=sae.width, unit="page", desc="pages", mininterval=1.0) as bar:
        return pages.write(latents, about, Path(config["out"]), bar.update)


def make_for(evaluation: Mapping[str, Any], folder: str) -> Path:
    """The pages of one SAE beside a report, from the same held-out text; all else as `conf/features.yaml` has it."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / "features.yaml"))
    assert isinstance(defaults, dict)
    own = {str(name): value for name, value in defaults.items() if name not in ("defaults", "hydra")}
    same = {name: evaluation[name] for name in ("cache", "tokens", "lm_batch", "device", "device_map")}
    return make({**own, **same, "folder": folder, "out": Path(evaluation["out"]) / "features"})


def main(config: DictConfig) -> None:
    """The stage, from Hydra's configuration."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    print(f"feature pages: {make({str(name): value for name, value in resolved.items()})}")
