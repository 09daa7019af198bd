"""The weights of an SAE as the bytes of safetensors files, a piece at a time: one file, or shards of so many latents.

A split dictionary is gathered so, and never lies whole in one memory; the bytes are those that one process would write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train.sae.base import SAE

PIECE = 1 << 24
"""Entries of a tensor at a time: 64 MB in float32."""
_TYPES = {  # the format's names, in the order in which it stores tensors: then by name
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
ENCODER, ENCODER_THERE = "W_enc_FD", "W_enc"  # a file has the encoder's weights as the formula, [D, F]


def name_in_file(name: str) -> str:
    """Give the name in a file of a tensor of the state dict."""
    return ENCODER_THERE if name == ENCODER else name


def has_latents(sae: SAE, name: str) -> bool:
    """Tell whether a tensor, by its name in a file or in the state dict, has a row for each latent."""
    return name not in sae.replicated and name not in dict(sae.named_buffers())


def weight_bytes(sae: SAE) -> int:
    """Count the bytes of all tensors of the whole SAE."""
    shapes = shapes_in_file(sae, range(sae.width))
    return sum(math.prod(shapes[name]) * tensor.dtype.itemsize for name, tensor in _tensors(sae).items())


def shard_latents(sae: SAE, most_bytes: int) -> list[range]:
    """Cut the latents into as few shards, all but the last of one size, as have at most so many bytes a file.

    One shard is the whole SAE. A file holds one latent at least; the first also has what has no row for each latent.
    """
    of_rows = sum(
        math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        for name, tensor in _tensors(sae).items()
        if has_latents(sae, name)
    )
    beside = weight_bytes(sae) - of_rows * sae.width
    at_most = max(1, (most_bytes - beside) // of_rows)
    size = math.ceil(sae.width / math.ceil(sae.width / at_most))
    return [range(first, min(first + size, sae.width)) for first in range(0, sae.width, size)]


def shapes_in_file(sae: SAE, latents: range) -> dict[str, list[int]]:
    """Give the tensors that a file of some latents has, each with its shape there.

    What has no row for each latent is in the file that begins with the first one.
    """
    shapes = {}
    for name, tensor in _tensors(sae).items():
        if has_latents(sae, name):
            shape = [len(latents), *tensor.shape[1:]]
            shapes[name] = shape[::-1] if name == ENCODER_THERE else shape
        elif latents.start == 0:
            shapes[name] = [*tensor.shape]
    return shapes


def weight_pieces(sae: SAE, latents: range | None = None, *, entries: int = PIECE) -> Iterator[bytes | memoryview]:
    """Yield a file in pieces of about so many entries of a tensor: of the whole SAE, or the shard of some `latents`.

    Of a split dictionary every process must take all pieces, as each is a message to the others.
    """
    latents = range(sae.width) if latents is None else latents
    shapes = shapes_in_file(sae, latents)
    tensors = {name: tensor for name, tensor in _tensors(sae).items() if name in shapes}
    yield file_header({name: (tensor.dtype, shapes[name]) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        for piece in _tensor_pieces(sae, name, tensor.detach(), latents, entries):
            yield tensor_bytes(piece)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of some tensors, whose bytes are made as they are written: no copy of them all is needed."""

    tensors: Mapping[str, Tensor]

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Yield the file in pieces, the same bytes as safetensors' own `save` makes."""
        ordered = in_file_order(self.tensors)
        yield file_header({name: (tensor.dtype, [*tensor.shape]) for name, tensor in ordered.items()})
        for tensor in ordered.values():
            for piece in pieces_of(tensor.detach()):
                yield tensor_bytes(piece)


def pieces_of(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor along its first dimension into pieces of about `PIECE` entries."""
    if not tensor.dim():
        yield tensor
        return
    yield from torch.split(tensor, max(1, PIECE // max(1, tensor[:1].numel())))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Give the bytes of a tensor's entries in their order, without a copy where they lie so."""
    # As a row of bytes; a tensor of no dimensions has none to view otherwise.
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_header(tensors: Mapping[str, tuple[torch.dtype, list[int]]]) -> bytes:
    """Write a file's head: its length, and where each tensor stands, in the order given."""
    entries: dict[str, object] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _TYPES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Order tensors as the format stores them: by type, then by name."""
    order = list(_TYPES)
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))}


def _tensors(sae: SAE) -> dict[str, Tensor]:
    """Give the tensors that are here, by their names in a file and in its order."""
    return in_file_order({name_in_file(name): tensor for name, tensor in sae.state_dict().items()})


def _tensor_pieces(sae: SAE, name: str, tensor: Tensor, latents: range, entries: int) -> Iterator[Tensor]:
    """Yield a tensor's part in the file of some latents in pieces, in the file's order."""
    if not has_latents(sae, name):
        yield tensor
    elif name == ENCODER_THERE:
        columns = max(1, entries // len(latents))
        for part_dD in torch.split(tensor, columns, dim=1):
            yield _rows(sae, part_dD, latents).t()
    else:
        at_once = max(1, entries // max(1, tensor[:1].numel()))
        for first in range(latents.start, latents.stop, at_once):
            yield _rows(sae, tensor, range(first, min(first + at_once, latents.stop)))


def _rows(sae: SAE, own: Tensor, latents: range) -> Tensor:
    """Gather the rows of some latents from the processes that hold them."""
    split = sae.split
    # What begins with a latent of the first process is dealt out as a dictionary of its own.
    start = latents.start // split.size * split.size
    rows = split.join(own[split.own(start) : split.own(latents.stop)], latents.stop - start)
    return rows[latents.start - start :]
