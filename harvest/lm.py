"""The language model: named in settings, checked cheaply, identified by its content, loaded for reading only.

A model is a local folder, a GGUF file, a hub name with an optional revision, or the word `embedded` for the one that
comes with the project. To import this module and to check a model loads no transformers, so a mistake is reported
before anything slow begins.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.base.config import Settings, Text
from data.base.errors import UserError
from data.base.records import Json
from harvest import hub
from harvest.model_class import model_class
from harvest.model_files import check_folder, check_gguf, has_tokenizer, read_config, weight_files
from harvest.tokenizer import TokenIds
from harvest.tokenizer import tokenizer_hash as tokenizer_hash  # for stages that know a model by this module

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).resolve().parent / "embedded"
DTYPES = ("float32", "bfloat16", "float16")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DEVICE = re.compile(r"auto|(cpu|mps)(:0)?|cuda(:\d+)?")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "seq_length")


class ModelSettings(Settings):
    """The `model` group."""

    name: Text | None = None
    """`embedded`, a local folder, a GGUF file, or a name on the hub."""
    revision: Text | None = None
    """A branch, tag or commit of the hub; null: the newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """What the model is run in; `auto`: what its config says of the weights."""
    device: Text = "auto"
    """cpu, mps, cuda or cuda:N; `auto`: CUDA, then MPS, then the CPU. Under torchrun `auto` and `cuda` are each
    process's own GPU of its host."""
    device_map: Text | dict[str, Any] | None = None
    """Spreads whole layers over the devices of one process, instead of `device`: `auto`, or a device by module. Handed
    to transformers as it is; needs accelerate (extra `big`)."""
    tp_plan: Literal["auto"] | None = None
    """`auto`: splits every layer over the processes that torchrun started, by transformers' plan for the architecture,
    instead of `device`."""
    attn_implementation: Text | None = None
    """Handed to transformers as it is: eager, sdpa, flash_attention_2."""


MODEL_FIELDS = frozenset(ModelSettings.model_fields)


@dataclass(frozen=True)
class LanguageModel:
    """A model by its settings: its files are looked for once, and what they say is read when it is asked for.

    settings: checked. path: the local folder or GGUF file, None for a model of the hub.
    """

    settings: ModelSettings
    name: str
    path: Path | None

    @classmethod
    def of(cls, given: Mapping[str, Any] | LanguageModel) -> LanguageModel:
        """Read the `model` group of a config; UserError for what can be refused from the settings alone."""
        if isinstance(given, LanguageModel):
            return given
        if not isinstance(given, Mapping):
            raise UserError(f"model={given} is no group of settings: give model.name=...")
        # null stands for a setting's default.
        chosen = {key: value for key, value in given.items() if value is not None or key not in MODEL_FIELDS}
        settings = ModelSettings.of(chosen, "model")
        if not settings.name:
            raise UserError("model.name is not set: name a local folder, a model of the hub, or `embedded`")
        if not _DEVICE.fullmatch(settings.device):  # others may exist, but torch need not be asked about these
            raise _no_device(settings.device)
        if settings.device_map is not None and settings.device != "auto":
            raise UserError("model.device and model.device_map are both set: keep one of them")
        if settings.device_map is not None and find_spec("accelerate") is None:
            raise UserError("model.device_map needs the package accelerate: install it or set model.device instead")
        if settings.tp_plan is not None and (settings.device_map is not None or settings.device != "auto"):
            other = "device" if settings.device_map is None else "device_map"
            raise UserError(f"model.{other} and model.tp_plan are both set: keep one of them")
        path = _local(settings.name)
        if settings.tp_plan is not None and path is not None and path.is_file():
            raise UserError(
                "model.tp_plan is for weights in safetensors, not for GGUF: set model.device_map=auto instead"
            )
        if settings.revision is not None and path is not None:
            raise UserError(f"model.revision holds for models of the hub only, and {settings.name!r} is local")
        return cls(settings, settings.name, path)

    @property
    def is_gguf(self) -> bool:
        return self.path is not None and self.path.is_file()

    def check(self) -> None:
        """Refuse within seconds what cannot be loaded: folder, truncated weights, unknown or unreachable name."""
        if self.settings.device.startswith(("cuda", "mps")):
            torch_device(self.settings.device)
        if self.path is not None:
            _ = self.folder
        elif hub.cached(self.name, self.settings.revision) is None:
            hub.ask(self.name, self.settings.revision)

    @cached_property
    def folder(self) -> Path:
        """Find the folder with the model's files, checked;
        a model of the hub is downloaded unless the cache has it."""
        if self.path is None:
            cached = hub.cached(self.name, self.settings.revision)
            return hub.download(self.name, self.settings.revision) if cached is None else cached
        if self.is_gguf:
            check_gguf(self.path)
            return self.path.parent
        check_folder(self.path)
        return self.path

    @property
    def _source(self) -> tuple[Path, Json]:
        """Return what transformers is to load from: a folder, and the options that name a file in it."""
        folder = self.folder
        return folder, {"gguf_file": self.path.name} if self.is_gguf and self.path is not None else {}

    def identity(self) -> Json:
        """Return what fixes the model's numbers: the hub's commit,
        or the sha256 of every local file that decides them."""
        folder, local = self.folder, self.path is not None
        if self.is_gguf and self.path is not None:
            files = {"model.gguf": self.path}
        else:
            paths = [folder / "config.json", *weight_files(folder)] if local else []
            files = {path.name: path for path in paths}
        return {
            "name": self.short_name if local else self.name,
            "commit": None if local else folder.name,
            "files": {name: _sha256(path) for name, path in files.items()},
            "attn_implementation": self.settings.attn_implementation,
        }

    @property
    def short_name(self) -> str:
        """Return the model's last name, fit for a folder: `gpt2` for `openai-community/gpt2`."""
        path = Path(os.path.abspath(Path(self.name).expanduser()))
        last = path.stem if self.is_gguf else path.name
        return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"

    @property
    def context_limit(self) -> int | None:
        """Return the longest context in tokens that the model's config allows; None where it sets no bound."""
        return self._count(_CONTEXT)

    @property
    def layer_count(self) -> int | None:
        """Return the number of blocks by the model's config; None where it does not say."""
        return self._count(_LAYERS)

    def _count(self, names: tuple[str, ...]) -> int | None:
        """Return the first of the settings that the config has, that of its language model before the whole one's."""
        config: Json = {} if self.is_gguf else read_config(self.folder)
        for level in (config.get("text_config") or {}, config):
            for key in names:
                if isinstance(level.get(key), int):
                    return int(level[key])
        text_config = self._auto_config.get_text_config()  # a default that config.json leaves out
        counts = [getattr(text_config, key, None) for key in names]
        return next((count for count in counts if isinstance(count, int)), None)

    @cached_property
    def _auto_config(self) -> Any:
        """Return the config as transformers reads it."""
        from transformers import AutoConfig

        folder, options = self._source
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        except Exception as error:
            raise UserError(f"model {self.name!r} cannot be loaded: {hub.first_line(error)}") from error

    @property
    def compute_dtype(self) -> str:
        """Return the name of the dtype the model is run in:
        as set, or what its config says of the weights, or float32."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        config: Json = {} if self.is_gguf else read_config(self.folder)  # GGUF's blocks unpack to float32
        levels = (config, config.get("text_config") or {})
        dtype = next((level[k] for level in levels for k in ("dtype", "torch_dtype") if level.get(k)), "float32")
        if dtype not in DTYPES:
            raise UserError(
                f"model.dtype=auto: the config of {self.name!r} says {dtype}, set one of {', '.join(DTYPES)}"
            )
        return str(dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase | TokenIds:
        """Load the tokenizer that comes with the model; where there is none, what takes its place for token ids."""
        folder, options = self._source
        if not self.is_gguf and not has_tokenizer(folder):
            return TokenIds(self.name, read_config(folder))
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        except Exception as error:
            raise UserError(
                f"the tokenizer of model {self.name!r} cannot be loaded: {hub.first_line(error)}"
            ) from error

    def load(self) -> PreTrainedModel:
        """Load the model in eval mode, without gradients or cache, on its device;
        UserError where a weight is missing."""
        folder, options = self._source
        device = torch_device(self.settings.device)
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar for each weight, before ours
        options |= {"attn_implementation": self.settings.attn_implementation, "device_map": self.settings.device_map}
        if self.settings.tp_plan is not None:
            options["distributed_config"] = self._split()
        if self.is_gguf:
            options["quantization_config"] = _dequantized()
        try:
            model, report = model_class(self._auto_config, self.name).from_pretrained(
                folder,
                dtype=getattr(torch, self.compute_dtype),
                output_loading_info=True,
                trust_remote_code=False,
                **{key: value for key, value in options.items() if value is not None},
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"model {self.name!r} cannot be loaded: {hub.first_line(error)}") from error
        # transformers would fill what is missing with random numbers.
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"the weights of model {self.name!r} lack {len(missing)} tensors, such as {missing[0]!r}")
        # With a device_map or a plan the model is spread already, and moving it would undo that.
        if self.settings.device_map is None and self.settings.tp_plan is None:
            model = model.to(device)
        # Keys and values of earlier tokens serve generation only; here they would be memory that nobody reads.
        model.config.get_text_config().use_cache = False
        return model.eval().requires_grad_(False)

    def _split(self) -> Any:
        """Return how transformers is to split the model over the processes; UserError where it cannot be split."""
        from transformers.distributed import DistributedConfig

        config = self._auto_config.get_text_config()
        plan = getattr(config, "base_model_tp_plan", None)
        if not plan:
            raise UserError(
                f"model.tp_plan=auto: transformers has no plan by which to split {config.model_type} models: "
                "use device_map=auto instead, in one process"
            )
        size = int(os.environ.get("WORLD_SIZE", "1"))
        counts = [getattr(config, name, None) for name in ("num_key_value_heads", "num_attention_heads")]
        heads = next((count for count in counts if isinstance(count, int)), size)
        if any(name.endswith(".k_proj") for name in plan) and heads % size:
            raise UserError(
                f"model.tp_plan=auto: {size} processes cannot share the {heads} key and value heads of a layer "
                f"of {self.name!r}: start a number of processes that divides them"
            )
        return DistributedConfig(tp_plan=self.settings.tp_plan)


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its token ids: its first parameter's, the embedding's.

    Where accelerate keeps that weight in memory or on disk between its uses, the device on which it is used.
    """
    import torch

    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)  # type: ignore[operator]
    used_on = getattr(hook, "execution_device", None)
    return torch.device("cpu" if used_on is None else used_on)


def _local(name: str) -> Path | None:
    """Find the local folder or GGUF file meant, or None where the name is one of the hub;
    UserError where it is neither."""
    path = EMBEDDED if name == "embedded" else Path(name).expanduser()
    try:
        if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
            return path
        exists = path.exists()
    except OSError as error:  # a name too long
        raise UserError(f"model.name={name[:80]!r} is no path ({error.strerror}): correct it") from None
    if exists:
        raise UserError(f"model {name!r} is a file: name the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(name) or path.suffix.lower() == ".gguf":
        raise UserError(f"model folder {name!r} does not exist: name a folder or a model of the hub")
    return None


def _dequantized() -> Any:
    """Have weights unpacked as they are loaded, whatever kernels this machine has."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older transformers always unpacks them
        return None
    return GgufConfig(dequantize=True)


def torch_device(asked: str) -> str:
    """Return the torch device meant; UserError where this machine has none such."""
    import torch

    has_mps = torch.backends.mps.is_available()
    device = asked
    if device == "auto":
        device = "mps" if has_mps else "cpu"
        if torch.cuda.is_available():
            device = "cuda"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        # More processes than GPUs share them.
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    kind, _, index = device.partition(":")
    count = {"cpu": 1, "mps": int(has_mps), "cuda": torch.cuda.device_count()}.get(kind, 0)
    if (index and not index.isdigit()) or int(index or 0) >= count:
        raise _no_device(asked)
    return device


def _no_device(asked: str) -> UserError:
    return UserError(f"model.device={asked} is not on this machine: set model.device=cpu or auto")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The same by a config's group, for stages that read one model once.


def check_model(model_cfg: Mapping[str, Any] | LanguageModel) -> None:
    """Refuse within seconds what cannot be loaded."""
    LanguageModel.of(model_cfg).check()


def identify(model_cfg: Mapping[str, Any] | LanguageModel) -> Json:
    """Return what fixes the model's numbers."""
    return LanguageModel.of(model_cfg).identity()


def load_model(model_cfg: Mapping[str, Any] | LanguageModel) -> PreTrainedModel:
    """Return the model in eval mode, on its device."""
    return LanguageModel.of(model_cfg).load()


def load_tokenizer(model_cfg: Mapping[str, Any] | LanguageModel) -> Any:
    """Return the tokenizer that comes with the model."""
    return LanguageModel.of(model_cfg).tokenizer()
