"""The language model: named in settings, checked cheaply, identified by its content, loaded for reading only.

A model is a local folder, a hub name with an optional revision, or the word `embedded` for the one shipped here. To
import this module and to call `check_model` loads no transformers, so a mistake is told before anything slow begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.base.errors import UserError
from harvest import hub
from harvest.model_class import model_class
from harvest.model_files import Json, check_folder, read_config, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).resolve().parent / "embedded"
DTYPES = ("float32", "bfloat16", "float16")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class ModelSettings:
    """The `model` group. device "auto" is CUDA, then MPS, then the CPU; dtype "auto" is what the model's config says.

    Under torchrun, which says so in LOCAL_RANK, "auto" and "cuda" are each process's own GPU of its host.

    `device_map` and `attn_implementation` are handed to transformers as they are.
    """

    name: str
    revision: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    device_map: Any = None
    attn_implementation: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder meant, or None where the name is one of the hub; UserError where it can be neither."""
        path = EMBEDDED if self.name == "embedded" else Path(self.name).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(f"model {self.name!r} is a file: name the folder that holds config.json and the weights")
        if not _HUB_NAME.fullmatch(self.name):
            raise UserError(f"model folder {self.name!r} does not exist: name a folder or a model of the hub")
        return None


def model_settings(model_cfg: Mapping[str, Any]) -> ModelSettings:
    """Read the `model` group of a config; UserError for an unknown key or a value that cannot hold."""
    given = {key: value for key, value in model_cfg.items() if key != "_target_" and value is not None}
    known = [field.name for field in fields(ModelSettings)]
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"model.{unknown[0]} is not a setting: the model has {', '.join(known)}")
    if "name" not in given:
        raise UserError("model.name is not set: name a local folder, a model of the hub, or `embedded`")
    for key, value in given.items():
        if key != "device_map" and not isinstance(value, str):
            raise UserError(f"model.{key}={value} is not a string: put it in quotes")
    settings = ModelSettings(**given)
    if settings.dtype not in ("auto", *DTYPES):
        raise UserError(f"model.dtype={settings.dtype} is not known: choose auto, {', '.join(DTYPES)}")
    if settings.device_map is not None and settings.device != "auto":
        raise UserError("model.device and model.device_map are both set: keep one of them")
    if settings.device_map is not None and find_spec("accelerate") is None:
        raise UserError("model.device_map needs the package accelerate: install it or set model.device instead")
    if settings.revision is not None and settings.folder is not None:
        raise UserError(f"model.revision holds for models of the hub only, and {settings.name!r} is a local folder")
    return settings


def check_model(model_cfg: Mapping[str, Any]) -> None:
    """Refuse within seconds what cannot be loaded: settings, folder, truncated weights, unknown or unreachable name."""
    settings = model_settings(model_cfg)
    if settings.device.startswith(("cuda", "mps")):
        _device(settings)
    if settings.folder is not None:
        check_folder(settings.folder)
    elif hub.cached(settings.name, settings.revision) is None:
        hub.ask(settings.name, settings.revision)


def identify(model_cfg: Mapping[str, Any]) -> Json:
    """What fixes the model's numbers: the hub's commit, or the sha256 of a local folder's config and weight files."""
    settings = model_settings(model_cfg)
    folder = _resolve(settings)
    local = settings.folder is not None
    files = [folder / "config.json", *weight_files(folder)] if local else []
    return {
        "name": short_name(model_cfg) if local else settings.name,
        "commit": None if local else folder.name,
        "files": {path.name: _sha256(path) for path in files},
        "attn_implementation": settings.attn_implementation,
    }


def short_name(model_cfg: Mapping[str, Any]) -> str:
    """The model's last name, fit for a folder: `gpt2` for `openai-community/gpt2`."""
    name = model_settings(model_cfg).name
    return re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(Path(name).expanduser())).name).strip("-.") or "model"


def context_limit(model_cfg: Mapping[str, Any]) -> int | None:
    """The longest context in tokens that the model's config allows; None where it sets no bound."""
    return _count(model_cfg, _CONTEXT)


def layer_count(model_cfg: Mapping[str, Any]) -> int | None:
    """The number of blocks by the model's config; None where it does not say."""
    return _count(model_cfg, _LAYERS)


def _count(model_cfg: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of the settings that the config has, that of its language model before the whole one's."""
    folder = _resolve(model_settings(model_cfg))
    config = read_config(folder)
    for level in (config.get("text_config") or {}, config):
        for key in names:
            if isinstance(level.get(key), int):
                return int(level[key])
    from transformers import AutoConfig  # a default that config.json leaves out

    full = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    found = [getattr(full, key, None) for key in names]
    return next((count for count in found if isinstance(count, int)), None)


def compute_dtype(model_cfg: Mapping[str, Any]) -> str:
    """The name of the dtype the model is run in: as set, or what its config says of the weights, or float32."""
    settings = model_settings(model_cfg)
    if settings.dtype != "auto":
        return settings.dtype
    config = read_config(_resolve(settings))
    text = config.get("text_config") or {}
    found = next((level[k] for level in (config, text) for k in ("dtype", "torch_dtype") if level.get(k)), "float32")
    if found not in DTYPES:
        raise UserError(
            f"model.dtype=auto: the config of {settings.name!r} says {found}, set one of {', '.join(DTYPES)}"
        )
    return str(found)


def load_tokenizer(model_cfg: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model."""
    settings = model_settings(model_cfg)
    folder = _resolve(settings)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"the tokenizer of model {settings.name!r} cannot be loaded: {hub.first_line(error)}"
        ) from error


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides its tokens: the whole pipeline where it has one, else the vocabulary; special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Json = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # state of the last call, not of the tokenizer
            rules.pop(passing, None)
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "all": sorted(tokenizer.all_special_ids)}
    text = json.dumps({"rules": rules, "special": special}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def load_model(model_cfg: Mapping[str, Any]) -> PreTrainedModel:
    """The model in eval mode, without gradients or cache, on its device; UserError where a weight is missing."""
    settings = model_settings(model_cfg)
    folder = _resolve(settings)
    device = _device(settings)
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for each weight, before ours
    asked = {"attn_implementation": settings.attn_implementation, "device_map": settings.device_map}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model, report = model_class(config, settings.name).from_pretrained(
            folder,
            dtype=getattr(torch, compute_dtype(model_cfg)),
            output_loading_info=True,
            trust_remote_code=False,
            **{key: value for key, value in asked.items() if value is not None},
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model {settings.name!r} cannot be loaded: {hub.first_line(error)}") from error
    # transformers would fill what is missing with random numbers.
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"the weights of model {settings.name!r} lack {len(missing)} tensors, such as {missing[0]!r}")
    if settings.device_map is None:
        model = model.to(device)
    model.config.get_text_config().use_cache = False
    return model.eval().requires_grad_(False)


def _device(settings: ModelSettings) -> str:
    import torch

    has_mps = torch.backends.mps.is_available()
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        # More processes than GPUs share them.
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    kind, _, index = device.partition(":")
    count = {"cpu": 1, "mps": int(has_mps), "cuda": torch.cuda.device_count()}.get(kind, 0)
    if (index and not index.isdigit()) or int(index or 0) >= count:
        raise UserError(f"model.device={settings.device} is not on this machine: set model.device=cpu or auto")
    return device


def _resolve(settings: ModelSettings) -> Path:
    """The folder with the model's files, checked; a model of the hub is downloaded unless the cache has it whole."""
    if settings.folder is not None:
        check_folder(settings.folder)
        return settings.folder
    cached = hub.cached(settings.name, settings.revision)
    return hub.download(settings.name, settings.revision) if cached is None else cached


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
