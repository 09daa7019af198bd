"""What the formats have in common: what is written beside the weights, what is read, and the folder's files."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.base.errors import UserError
from data.base.records import Json
from data.base.sites import INPUT_KINDS, Site
from train.sae.base import SAE
from train.sae.io import VARIANTS, inference_settings
from train.sae.weights_file import TensorFile

Files = dict[str, bytes | TensorFile]
"""The files of a format by their names."""
OURS = "thresher"  # the key under which a format's settings carry ours
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Foreign:
    """sae: as the folder holds it. site: what the folder calls it, None where it does not say. ours: what we wrote
    beside the weights of an SAE of ours, {} in a folder of another's making. target: of a transcoder, likewise."""

    sae: SAE
    site: str | None
    ours: Json
    target: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where an SAE of ours comes from, as other tools ask for it; from its config.json."""

    variant: str
    settings: Json
    site: Site
    fingerprint: str
    store: str
    model: str  # the hub's name, or a local folder's last one
    packing: Json
    target: Site | None = None  # of a transcoder

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path) -> Origin:
        """Read the origin from an SAE's record; UserError where it lacks something."""
        if missing := [
            name for name in ("site", "fingerprint", "store", "model_name", "packing") if name not in config
        ]:
            raise UserError(
                f"{folder} does not record its {missing[0]}, which other tools ask for: train it with this version"
            )
        rest = (config["fingerprint"], config["store"], config["model_name"], config["packing"])
        target = None if config.get("target") is None else Site.parse(config["target"])
        return cls(config["variant"], config["settings"], Site.parse(config["site"]), *rest, target)

    @property
    def hook(self) -> str:
        """Return the site as TransformerLens names it; a module's path is its own name."""
        return hook_name(self.site)

    @property
    def hook_out(self) -> str:
        """Return the target of a transcoder as TransformerLens names it."""
        assert self.target is not None
        return hook_name(self.target)

    @property
    def layer(self) -> int | None:
        """Return the site's layer, by the first number of a module's path where it is one."""
        found = _LAYER.search(self.site.path or "")
        return int(found[1]) if found else self.site.layer

    @property
    def prepend_bos(self) -> bool:
        """Return whether a text began with a BOS token in training."""
        return bool(self.packing["bos"] != "none")

    def json(self) -> Json:
        """Return what our readers want back."""
        target = {} if self.target is None else {"target": str(self.target)}
        names = {"site": str(self.site), **target, "fingerprint": self.fingerprint, "store": self.store}
        return {"variant": self.variant, "settings": self.settings, **names}


def hook_name(site: Site) -> str:
    """Name a site as TransformerLens does; what a module reads by its TransformerBridge, a module by its own path."""
    if site.path is not None:
        return str(site)
    if site.kind in INPUT_KINDS:
        return f"blocks.{site.layer}.{site.kind.removesuffix('_in')}.hook_in"
    return f"blocks.{site.layer}.hook_{site.kind}"


def refuse_transcoder(sae: SAE, format_name: str, instead: str) -> None:
    """Raise UserError where a format that holds autoencoders alone is asked to hold a transcoder."""
    if sae.transcodes:
        raise UserError(f"{format_name} has no class for a transcoder of {sae.name}: {instead}")


def construct(variant: str, ours: Json, **needed: Any) -> SAE:
    """Make an SAE of a variant: settings of the folder, else those that we recorded of the same variant, else defaults.

    What only training uses and nobody recorded: a coefficient of 0.
    """
    recorded = inference_settings(ours["settings"]) if ours.get("variant") == variant else {}
    settings = recorded | needed
    if "sparsity" in VARIANTS[variant].Config.model_fields:
        settings.setdefault("sparsity", 0.0)
    return VARIANTS[variant](**settings)


def fill(sae: SAE, tensors: Mapping[str, Tensor], folder: Path) -> SAE:
    """Give the SAE the folder's tensors, W_enc as [D, F]; UserError where a shape is another or a value not finite."""
    state = sae.state_dict()
    for name, tensor in tensors.items():
        here, value = ("W_enc_FD", tensor.t()) if name == "W_enc" else (name, tensor)
        if value.shape != state[here].shape:
            wanted = [*(state[here].t() if name == "W_enc" else state[here]).shape]
            raise UserError(f"{folder}: {name} is {[*tensor.shape]} and should be {wanted}: restore the folder")
        if not bool(value.isfinite().all()):
            raise UserError(f"{folder}: {name} has values that are not finite: restore the folder")
        state[here] = value.float().contiguous()
    sae.load_state_dict(state)
    return sae


def own_record(settings: Mapping[str, Any], folder: Path) -> Json:
    """Read what we wrote into a format's settings, {} where we wrote nothing;
    UserError where it is not what we write."""
    ours = settings.get(OURS)
    if ours is None:
        return {}
    if not isinstance(ours, dict) or ours.get("variant") not in VARIANTS or not isinstance(ours.get("settings"), dict):
        raise UserError(f"{folder} carries a damaged record of this project: restore the folder")
    return ours


def settings_in(path: Path) -> Json:
    """Read a JSON object from a file; UserError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object: restore the folder")
    return found


def wanted(settings: Mapping[str, Any], name: str, path: Path) -> Any:
    """Read a setting that must be there."""
    if name not in settings:
        raise UserError(f"{path} does not say {name}: restore the folder")
    return settings[name]


def tensors_in(path: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file or a state dict of torch.save, by our names:
    {theirs: ours}; UserError."""
    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore the folder") from None
    except OSError:
        raise
    except Exception as error:  # torch's unpickler has as many kinds of errors as damage has
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): restore the folder") from None
    if not isinstance(held, dict):
        raise UserError(f"{path} holds no state dict: restore the folder")
    if missing := sorted(names.keys() - held.keys()):
        raise UserError(
            f"{path} lacks {missing[0]}: restore the folder, or name one of the class that its settings say"
        )
    return {ours: held[theirs] for theirs, ours in names.items()}


def json_bytes(obj: Json) -> bytes:
    return (json.dumps(obj, indent=2, allow_nan=False) + "\n").encode()


def torch_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Write in memory what torch.save would write."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()
