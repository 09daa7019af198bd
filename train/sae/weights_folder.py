"""The files of an SAE's folder that hold its weights: `sae.safetensors`, or shards of it with an index.

Large weights are in shards, as 2 x 16M x 768 numbers would be one file of 103 GB: `sae-00001-of-00021.safetensors` has
the tensors of `sae.safetensors` for the first so many latents, rows of W_dec and columns of W_enc, the next file those
of the latents after them; the first one also has what is no latent's own. `sae.safetensors.index.json` lists them with
their latents and checksums, and config.json has the checksum of the index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.base.errors import UserError
from train.sae.base import SAE
from train.sae.weights_file import ENCODER_THERE, has_latents, name_in_file, pieces_of, shapes_in_file

WEIGHTS, INDEX = "sae.safetensors", "sae.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""The most bytes of a file of weights: where the Hugging Face hub's own libraries cut theirs."""
SHA256 = "weights_sha256"  # in config.json, of sae.safetensors or the index; folders of earlier versions have none
_REMEDY = "train this SAE again or restore the file"


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights. latents: those whose rows it has. sha256: what it should be; None where nothing says so."""

    path: Path
    latents: range
    sha256: str | None


def weights_name(number: int, count: int) -> str:
    """Name a shard, by its number from 0 on."""
    return f"sae-{number + 1:05}-of-{count:05}.safetensors"


def folders_below(place: Path) -> set[Path]:
    """Find the folders at or below a place that hold an SAE's weights."""
    return {path.parent for name in (WEIGHTS, INDEX) for path in place.rglob(name)}


def remove_other_weights(folder: Path, names: Sequence[str]) -> None:
    """Remove files of weights that are none of `names`, also what a killed process left of a shard."""
    patterns = (WEIGHTS, INDEX, "sae-*-of-*.safetensors", ".sae-*-of-*.safetensors.tmp")
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if path.name not in names:
            path.unlink(missing_ok=True)


def index_bytes(files: Sequence[WeightsFile], total_size: int) -> bytes:
    """Write the index of shards: in the form of transformers' where it says the same, each shard with its latents."""
    index = {
        "metadata": {"total_size": total_size, "width": files[-1].latents.stop},
        "shards": [
            {"file": file.path.name, "first": file.latents.start, "last": file.latents.stop, "sha256": file.sha256}
            for file in files
        ],
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def weights_files(folder: Path, width: int, sha256: str | None, *, sharded: bool) -> list[WeightsFile]:
    """List the files that hold the weights of so many latents, in their order; `sha256` is what config.json says.

    UserError where one is missing, or the index is not the one that was written.
    """
    if sharded:
        files = _indexed(folder / INDEX, sha256, width)
    else:
        files = [WeightsFile(folder / WEIGHTS, range(width), sha256)]
    for file in files:
        if not file.path.is_file():
            raise UserError(f"{file.path} is missing: {_REMEDY}")
    return files


def _indexed(path: Path, sha256: str | None, width: int) -> list[WeightsFile]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {_REMEDY}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is damaged, its checksum is another: {_REMEDY}")
    try:
        shards = json.loads(data)["shards"]
        files = [
            WeightsFile(path.with_name(shard["file"]), range(shard["first"], shard["last"]), str(shard["sha256"]))
            for shard in shards
        ]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no index of an SAE's weights: {_REMEDY}") from None
    ends = [0, *(file.latents.stop for file in files)]
    whole = [file.latents.start for file in files] == ends[:-1] and ends[-1] == width
    if not whole or any(shard["file"] != weights_name(number, len(files)) for number, shard in enumerate(shards)):
        raise UserError(f"{path} does not list the {width} latents of this SAE: {_REMEDY}")
    return files


def mapped_tensors(sae: SAE, file: WeightsFile) -> dict[str, Tensor]:
    """Open a file's tensors, which stay on the disk but for what is read of them.

    `sae` says what must be in it, and may have no values itself. UserError where the file is damaged or does not fit.
    """
    # Before the bytes are parsed: a damaged file may still parse, into other weights.
    if file.sha256 is not None and _digest(file.path) != file.sha256:
        raise UserError(f"{file.path} is damaged, its checksum is another: {_REMEDY}")
    try:
        with safe_open(file.path, "pt") as there:
            tensors = {name: there.get_tensor(name) for name in there.keys()}  # noqa: SIM118
            _refuse_others(sae, tensors, file.latents)
    except (SafetensorError, ValueError) as error:
        raise misfit(file.path, error) from None
    return tensors


def read_weights(sae: SAE, files: Sequence[WeightsFile]) -> dict[str, Tensor]:
    """Read the state dict of an SAE, its tensors by their names in a file: of a split one the rows of its own latents.

    `sae` says the shapes and may have no values itself. UserError where a file is damaged, does not fit, or has a value
    that is not finite, in whichever latents: so every process of a split dictionary is refused, or none.
    """
    state = {name_in_file(name): torch.empty_like(value, device="cpu") for name, value in sae.state_dict().items()}
    for file in files:
        for name, tensor in mapped_tensors(sae, file).items():
            _take(sae, name, state[name], tensor, file)
    return state


def misfit(path: Path, error: Exception) -> UserError:
    """Make the sentence for a file that holds another SAE than config.json describes."""
    reason = str(error).splitlines()[0]
    return UserError(f"{path} does not fit its config.json ({reason}): train this SAE again or restore the files")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_others(sae: SAE, tensors: Mapping[str, Tensor], latents: range) -> None:
    """Raise ValueError where a file has other tensors, or of other shapes, than it should."""
    due = shapes_in_file(sae, latents)
    if lacking := sorted(due.keys() - tensors.keys()):
        raise ValueError(f"it lacks {lacking[0]}")
    if strange := sorted(tensors.keys() - due.keys()):
        raise ValueError(f"it has {strange[0]}, and {sae.name} has no such tensor")
    for name, shape in due.items():
        if [*tensors[name].shape] != shape:
            raise ValueError(f"{name} is {[*tensors[name].shape]} and should be {shape}")


def _take(sae: SAE, name: str, own: Tensor, tensor: Tensor, file: WeightsFile) -> None:
    """Copy what is the SAE's own of a tensor of a file."""
    for piece in pieces_of(tensor):
        if not bool(piece.to(own.dtype).isfinite().all()):
            raise UserError(
                f"{file.path} has values in {name} that are not finite: train this SAE again or restore the file"
            )
    if not has_latents(sae, name):
        own.copy_(tensor)
        return
    split, latents = sae.split, file.latents
    first = (split.rank - latents.start) % split.size
    rows = by_latents(name, tensor)[first :: split.size]
    own[split.own(latents.start) : split.own(latents.stop)].copy_(rows)


def by_latents(name: str, tensor: Tensor) -> Tensor:
    """Give a tensor of a file with its latents as rows."""
    return tensor.t() if name == ENCODER_THERE else tensor
