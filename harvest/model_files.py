"""What a folder must hold to be a language model, seen from its files alone, without torch or transformers.

What `from_pretrained` reads there that can change a number, and where each is in a store's identity:

    config.json                         hashed; a quantisation is described in it, and needs its own library
    model.safetensors, pytorch_model.*  hashed, the index and each shard of it
    a weight file that config.json names (transformers_weights)      refused
    adapter_config.json (a LoRA beside the weights)                  refused: it loads only where peft is installed
    auto_map in config.json (code of the model's own)                never run: trust_remote_code is off
    tokenizer files                     by the tokenizer they make (`harvest.lm.tokenizer_hash`)
    chat templates                      hashed where text.chat uses one (`harvest.chat.template_hash`)
    generation_config.json              not used
"""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from pathlib import Path

from data.base.errors import UserError
from data.base.records import Json

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = "adapter_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def check_folder(folder: Path) -> None:
    """Raise UserError unless the folder holds a decoder's config and whole weight files,
    with nothing that alters them."""
    config = read_config(folder)
    if config.get("is_encoder_decoder"):
        raise UserError(f"model folder {folder} holds an encoder-decoder model: only decoder-only models are harvested")
    if (folder / ADAPTER).exists():
        raise UserError(
            f"model folder {folder} holds an adapter beside the weights ({ADAPTER}): merge it into them (peft's "
            "merge_and_unload, then save_pretrained), or remove it"
        )
    if config.get("transformers_weights"):
        raise UserError(
            f"{folder / 'config.json'} names a weight file of its own (transformers_weights): rename that file to "
            "model.safetensors and remove the line"
        )
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.suffix == ".bin":
            _check_zip(path)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer lies beside the weights; a model without one is given token ids."""
    return any((folder / name).is_file() for name in TOKENIZER)


def check_gguf(path: Path) -> None:
    """Raise UserError unless the file is one whole GGUF model and what reads it is installed."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} is damaged or no GGUF file: copy or download it again")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise UserError(f"{path} is one part of a model: join the parts with `llama-gguf-split --merge`")
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"{path} needs the extra `gguf`, which is not installed: run `.venv/bin/pip install {' '.join(missing)}`"
        )


def read_config(folder: Path) -> Json:
    """Read the folder's config.json as it stands."""
    path = folder / "config.json"
    if not path.is_file():
        if gguf := sorted(folder.glob("*.gguf")):
            raise UserError(f"model folder {folder} has no config.json but GGUF files: name one, as {gguf[0]}")
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
    """List the weight files, an index first where there are shards; UserError where one is missing."""
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
    """Check that the header's length, the header and the last tensor it lists fit the size of the file."""
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
    """Check the zip's directory, which torch.save writes last (before 1.6 a plain pickle,
    which tells nothing cheaply)."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if path.stat().st_size == 0 or (is_zip and not zipfile.is_zipfile(path)):
        raise UserError(f"weight file {path} is truncated or damaged: copy or download it again")
