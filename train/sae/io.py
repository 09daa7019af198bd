"""An SAE on disk: `sae.safetensors` and `config.json`, plain names and numbers only, the weights under a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor

from data.base.errors import UserError
from data.base.files import atomic_file, write_atomic
from train.sae.base import SAE
from train.sae.config import RETIRED
from train.sae.variants.batchtopk import BatchTopK
from train.sae.variants.gated import Gated
from train.sae.variants.jumprelu import JumpReLU
from train.sae.variants.matryoshka import Matryoshka
from train.sae.variants.relu import ReLU
from train.sae.variants.topk import TopK
from train.sae.weights_file import ENCODER, ENCODER_THERE, weight_pieces

SAE_FORMAT = 1
WEIGHTS, CONFIG = "sae.safetensors", "config.json"
SHA256 = "weights_sha256"  # in config.json, of sae.safetensors; folders of earlier versions have none

VARIANTS: dict[str, type[SAE]] = {
    variant.name: variant for variant in (ReLU, TopK, BatchTopK, Matryoshka, Gated, JumpReLU)
}


def _turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transpose and rename the encoder's weights of a file, which has them as the formula, [D, F]."""
    return {
        ENCODER if name == ENCODER_THERE else name: tensor.t() if name == ENCODER_THERE else tensor
        for name, tensor in state.items()
    }


def save(sae: SAE, folder: str | Path, record: dict[str, Any]) -> None:
    """Write the SAE into `folder`: weights first, then the config, so that a config means a whole SAE.

    `record` (plain JSON) says what the SAE is of: site, a transcoder's target, fingerprint, store, model, training. Of
    a split dictionary all its processes call this, and the first one writes the whole.
    """
    folder = Path(folder)
    config = {"format": SAE_FORMAT, "variant": sae.name, "settings": sae.settings(), **record}
    json.dumps(config, allow_nan=False)  # raises before anything is written
    if sae.split.rank:
        for _ in weight_pieces(sae):  # the first process writes what all of them send
            pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    # An older SAE's config beside new weights would be a wrong SAE; without a config the folder holds none.
    (folder / CONFIG).unlink(missing_ok=True)
    digest = hashlib.sha256()
    with atomic_file(folder / WEIGHTS) as file:
        for piece in weight_pieces(sae):
            file.write(piece)
            digest.update(piece)
    config[SHA256] = digest.hexdigest()
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2, allow_nan=False) + "\n").encode())


def load_config(folder: str | Path) -> dict[str, Any]:
    """Read the record of the SAE in `folder`; UserError where there is none or it is damaged or of a newer format."""
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no trained SAE ({CONFIG} is missing): name a folder that training has finished"
        ) from None
    except ValueError:
        raise UserError(f"{path} is damaged: train this SAE again or restore the file") from None
    if not isinstance(config, dict) or not {"format", "variant", "settings"} <= config.keys():
        raise UserError(f"{path} does not describe an SAE: train this SAE again or restore the file")
    if config["format"] != SAE_FORMAT:
        raise UserError(
            f"{path} has format {config['format']} and this version reads {SAE_FORMAT}: use the version that wrote it"
        )
    if config["variant"] not in VARIANTS:
        raise UserError(f"{path} names the variant {config['variant']!r}: this version knows {', '.join(VARIANTS)}")
    return config


def load(folder: str | Path) -> SAE:
    """Load the SAE in `folder` on the CPU, bit for bit as saved.

    Raises UserError where the folder is not whole, the weights are not those that were saved, or not all are finite.
    """
    config = load_config(folder)
    path = Path(folder) / WEIGHTS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train this SAE again or restore the file") from None
    # Before the bytes are parsed: a damaged file may still parse, into other weights.
    if config.get(SHA256, digest := hashlib.sha256(data).hexdigest()) != digest:
        raise UserError(f"{path} is damaged, its checksum is another: train this SAE again or restore the file")
    try:
        sae = VARIANTS[config["variant"]](**inference_settings(config["settings"]))
        sae.load_state_dict(_turned(from_bytes(data)))
    except (SafetensorError, RuntimeError, TypeError, UserError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} does not fit its {CONFIG} ({reason}): train this SAE again or restore the files"
        ) from None
    if unfit := [name for name, tensor in sae.state_dict().items() if not bool(tensor.isfinite().all())]:
        raise UserError(
            f"{path} has values in {unfit[0]} that are not finite: train this SAE again or restore the file"
        )
    sae.site, sae.target = site_of(config), config.get("target")
    sae.record = config
    return sae


def site_of(config: dict[str, Any]) -> str | None:
    """Name the site that a record's SAE reads; a crosscoder's sites one after another, with their stores where these
    are several."""
    sites = config.get("sites")
    if sites is None:
        return config.get("site")
    several = len({site.get("fingerprint") for site in sites}) > 1
    return " + ".join(f"{site['site']} of {site['store']}" if several else str(site["site"]) for site in sites)


def inference_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a record's settings those of earlier versions that the inference form never read."""
    return {name: value for name, value in settings.items() if name not in RETIRED}
