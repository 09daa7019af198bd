"""The weights of an SAE as the bytes of a safetensors file, a piece at a time.

A split dictionary is gathered so, and never lies whole in one memory; the bytes are those that one process would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from train.sae.base import SAE

_PIECE = 1 << 24  # entries of a tensor at a time
_TYPES = {  # the format's names, in the order in which it stores tensors: then by name
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
ENCODER, ENCODER_THERE = "W_enc_FD", "W_enc"  # a file has the encoder's weights as the formula, [D, F]


def weight_pieces(sae: SAE, entries: int = _PIECE) -> Iterator[bytes]:
    """Yield the file in pieces of about so many entries of a tensor.

    Of a split dictionary every process must take all pieces, as each is a message to the others.
    """
    tensors = {ENCODER_THERE if name == ENCODER else name: tensor for name, tensor in sae.state_dict().items()}
    order = list(_TYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    yield _header(sae, {name: tensors[name] for name in names})
    for name in names:
        for piece in _tensor_pieces(sae, name, tensors[name].detach(), entries):
            yield piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_whole(sae: SAE, name: str) -> bool:
    """Tell whether every process has all of a tensor."""
    return name in sae.replicated or name in dict(sae.named_buffers())


def _header(sae: SAE, tensors: dict[str, Tensor]) -> bytes:
    """Write the file's head: its length, and where each tensor of the whole SAE stands."""
    entries: dict[str, object] = {}
    at = 0
    for name, tensor in tensors.items():
        shape = [*tensor.shape] if _is_whole(sae, name) else [sae.width, *tensor.shape[1:]]
        if name == ENCODER_THERE:
            shape.reverse()
        size = torch.Size(shape).numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return len(text).to_bytes(8, "little") + text


def _tensor_pieces(sae: SAE, name: str, tensor: Tensor, entries: int) -> Iterator[Tensor]:
    """Yield a tensor of the whole SAE in pieces, in the file's order."""
    split, width = sae.split, sae.width
    if _is_whole(sae, name):
        yield tensor
    elif name == ENCODER_THERE:
        columns = max(1, entries // width)
        for part_Fd in torch.split(tensor, columns, dim=1):
            yield split.join(part_Fd, width).t()
    else:
        # A piece that begins with a latent of the first process is dealt out as a dictionary of its own.
        latents = max(1, entries // max(1, tensor[:1].numel()) // split.size) * split.size
        for first in range(0, width, latents):
            last = min(first + latents, width)
            yield split.join(tensor[split.own(first) : split.own(last)], last - first)
