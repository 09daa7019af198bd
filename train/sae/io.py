"""An SAE on disk: `sae.safetensors` and `config.json`, plain names and numbers only, the weights under a checksum.

Weights of more than 5 GB are in shards; `weights_folder.py` says how.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.base.errors import UserError
from data.base.files import atomic_file, write_atomic
from train.sae.base import SAE
from train.sae.config import RETIRED
from train.sae.parts.split import WHOLE, LatentSplit
from train.sae.variants.batchtopk import BatchTopK
from train.sae.variants.gated import Gated
from train.sae.variants.jumprelu import JumpReLU
from train.sae.variants.matryoshka import Matryoshka
from train.sae.variants.relu import ReLU
from train.sae.variants.topk import TopK
from train.sae.weights_file import (
    ENCODER,
    ENCODER_THERE,
    has_latents,
    pieces_of,
    shapes_in_file,
    shard_latents,
    weight_bytes,
    weight_pieces,
)
from train.sae.weights_folder import (
    INDEX,
    SHA256,
    SHARD_BYTES,
    WEIGHTS,
    WeightsFile,
    by_latents,
    index_bytes,
    mapped_tensors,
    misfit,
    read_weights,
    remove_other_weights,
    weights_files,
    weights_name,
)

CONFIG, SAE_FORMAT, SHARDED_FORMAT = "config.json", 1, 2  # the format: the weights in one file, or in shards

VARIANTS: dict[str, type[SAE]] = {
    variant.name: variant for variant in (ReLU, TopK, BatchTopK, Matryoshka, Gated, JumpReLU)
}


def save(sae: SAE, folder: str | Path, record: dict[str, Any], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the SAE into `folder`: weights first, then the config, so that a config means a whole SAE.

    `record` (plain JSON) says what the SAE is of: site, a transcoder's target, fingerprint, store, model, training.
    Weights of more than `shard_bytes` go into shards of at most so many. Of a split dictionary all its processes call
    this, and the first one writes the whole, a piece at a time.
    """
    folder = Path(folder)
    shards = shard_latents(sae, shard_bytes)
    sharded = len(shards) > 1
    layout = SHARDED_FORMAT if sharded else SAE_FORMAT
    config = {"format": layout, "variant": sae.name, "settings": sae.settings(), **record}
    json.dumps(config, allow_nan=False)  # raises before anything is written
    if sae.split.rank:
        for latents in shards:
            for _ in weight_pieces(sae, latents):  # the first process writes what all of them send
                pass
        return
    folder.mkdir(parents=True, exist_ok=True)
    # An older SAE's config beside new weights would be a wrong SAE; without a config the folder holds none.
    (folder / CONFIG).unlink(missing_ok=True)
    names = [weights_name(number, len(shards)) for number in range(len(shards))] if sharded else [WEIGHTS]
    remove_other_weights(folder, names)
    files = []
    for name, latents in zip(names, shards, strict=True):
        digest = hashlib.sha256()
        with atomic_file(folder / name) as file:
            for piece in weight_pieces(sae, latents):
                file.write(piece)
                digest.update(piece)
        files.append(WeightsFile(folder / name, latents, digest.hexdigest()))
    config[SHA256] = files[0].sha256
    if sharded:
        index = index_bytes(files, weight_bytes(sae))
        write_atomic(folder / INDEX, index)
        config[SHA256] = hashlib.sha256(index).hexdigest()
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
    if config["format"] not in (SAE_FORMAT, SHARDED_FORMAT):
        raise UserError(
            f"{path} has format {config['format']} and this version reads {SAE_FORMAT} and {SHARDED_FORMAT}: use the "
            "version that wrote it"
        )
    if config["variant"] not in VARIANTS:
        raise UserError(f"{path} names the variant {config['variant']!r}: this version knows {', '.join(VARIANTS)}")
    return config


def load(folder: str | Path, split: LatentSplit = WHOLE) -> SAE:
    """Load the SAE in `folder` on the CPU, bit for bit as saved, from one file of weights or from shards.

    With `split` only the latents of one process are read, `LatentSplit(4, 1)` for those of the second of four; what
    it computes needs the others, and `split.handle` their process group. Memory is that of the latents read.

    Raises UserError where the folder is not whole, the weights are not those that were saved, or not all are finite.
    """
    config, sae, files = _described(Path(folder), split)
    state = read_weights(sae, files)
    state[ENCODER] = state.pop(ENCODER_THERE)
    sae.load_state_dict(state, assign=True)
    sae.site, sae.target = config.get("site"), config.get("target")
    sae.record = config
    return sae


def read_rows(folder: str | Path, name: str, latents: range | None = None) -> Iterator[Tensor]:
    """Read the rows of some latents, one after another in steps of one, or of all: of W_enc, W_dec, or what else has
    one for each latent.

    Yields them in pieces and loads nothing else, so that a few latents of an SAE larger than the memory can be seen;
    of W_enc [D, F] a row is a latent's column. Raises UserError where a file that has some of them is damaged.
    """
    _, sae, files = _described(Path(folder), WHOLE)
    names = [known for known in shapes_in_file(sae, range(sae.width)) if has_latents(sae, known)]
    if name not in names:
        raise UserError(f"{name} is nothing that {sae.name} has for each latent: name one of {', '.join(names)}")
    latents = range(sae.width) if latents is None else latents
    if latents.step != 1 or not 0 <= latents.start <= latents.stop <= sae.width:
        raise UserError(f"{latents} is no part of the {sae.width} latents in {folder}: give a range within them")
    for file in files:
        first, last = max(latents.start, file.latents.start), min(latents.stop, file.latents.stop)
        if first < last:
            rows = by_latents(name, mapped_tensors(sae, file)[name])
            yield from pieces_of(rows[first - file.latents.start : last - file.latents.start])


def _described(folder: Path, split: LatentSplit) -> tuple[dict[str, Any], SAE, list[WeightsFile]]:
    """Read what config.json says: it, the SAE as shapes only, and the files of its weights."""
    config = load_config(folder)
    try:
        with torch.device("meta"):  # the first weights would be drawn for nothing
            sae = VARIANTS[config["variant"]](**inference_settings(config["settings"]), split=split)
    except (RuntimeError, TypeError, UserError) as error:
        raise misfit(folder / WEIGHTS, error) from None
    sharded = config["format"] == SHARDED_FORMAT
    return config, sae, weights_files(folder, sae.width, config.get(SHA256), sharded=sharded)


def inference_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a record's settings those of earlier versions that the inference form never read."""
    return {name: value for name, value in settings.items() if name not in RETIRED}
