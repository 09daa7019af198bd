"""What a folder must hold to be a language model, told from its files alone, without torch or transformers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from data.base.errors import UserError

Json = dict[str, Any]
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def check_folder(folder: Path) -> None:
    """UserError unless the folder holds a decoder's config, whole weight files and a tokenizer."""
    config = read_config(folder)
    if config.get("is_encoder_decoder"):
        raise UserError(f"model folder {folder} holds an encoder-decoder model: only decoder-only models are harvested")
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.suffix == ".bin":
            _check_zip(path)
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise UserError(f"model folder {folder} has no tokenizer (tokenizer.json): copy it there")


def read_config(folder: Path) -> Json:
    """The folder's config.json as it stands."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model folder {folder} has no config.json: name a folder made by save_pretrained")
    return _read_json(path)


def _read_json(path: Path) -> Json:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (no JSON object): copy or download it again")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The weight files, an index first where there are shards; UserError where one is missing."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = [folder / shard for shard in sorted(set(_read_json(index).get("weight_map", {}).values()))]
            for shard in shards:
                if not shard.is_file():
                    raise UserError(f"weight file {shard} is missing: copy or download it again")
            return [index, *shards]
    raise UserError(f"model folder {folder} has no weights (model.safetensors): name a folder made by save_pretrained")


def _check_safetensors(path: Path) -> None:
    """The header's length, the header and the last tensor it lists must fit the size of the file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
        assert isinstance(header, dict)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (AssertionError, ValueError, KeyError, TypeError):
        raise UserError(f"weight file {path} is truncated or damaged: copy or download it again") from None
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise UserError(f"weight file {path} has {size} bytes of {wanted}: copy or download it again")


def _check_zip(path: Path) -> None:
    """torch.save writes a zip, whose directory comes last (before 1.6 a plain pickle, which tells nothing cheaply)."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if path.stat().st_size == 0 or (is_zip and not zipfile.is_zipfile(path)):
        raise UserError(f"weight file {path} is truncated or damaged: copy or download it again")
