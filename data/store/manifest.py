"""What a store is: its identity, the settings it was asked with, and where they are written down."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from data.base.errors import UserError
from data.base.records import Json, flatten, json_digest, seal, unseal
from data.store.layout import Layout

STORE_FORMAT = 1

# Settings that were added with a default that changes nothing: {dotted name: default}. A store that was made before
# one, and so does not say it, is found by settings that leave it as it is. Null needs no line here.
DEFAULTS: dict[str, object] = {}
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class Manifest:
    """The first file of a store.

    `identity` is everything that determines the numbers; `settings` is what was asked for, before any hash, names only.
    """

    identity: Json
    settings: Json
    name: str  # short model name, for the folder
    d_model: int  # width of the residual sites

    def __post_init__(self) -> None:
        assert re.fullmatch(r"\w[\w.-]*", self.name), f"{self.name!r} cannot name a folder"

    @cached_property
    def fingerprint(self) -> str:
        return json_digest(self.identity)

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.fingerprint[:12]}"

    @cached_property
    def layout(self) -> Layout:
        return Layout.from_json(self.identity["layout"])

    def to_json(self) -> bytes:
        return seal({"format": STORE_FORMAT, "fingerprint": self.fingerprint} | asdict(self), indent=2)

    @classmethod
    def from_json(cls, data: bytes, path: object) -> Manifest:
        """Read a manifest's content; a UserError naming the file where it is damaged or of a newer format."""
        remedy = "restore it from a copy, or delete the folder and harvest again"
        obj = unseal(data, path, remedy)
        # Before any field is looked at: a newer format may have other fields, and "damaged" would be the wrong word for
        # it.
        if obj.pop("format", 0) > STORE_FORMAT:
            raise UserError(f"{path} is of a newer format than this version reads ({STORE_FORMAT}): update the program")
        try:
            fingerprint = obj.pop("fingerprint")
            manifest = cls(**obj)
            # The layout is parsed here, so that a bad one is found when the store is opened and not at the first chunk.
            sound = manifest.fingerprint == fingerprint and manifest.layout is not None
        except (TypeError, KeyError, AssertionError):  # sealed, but a file of another kind
            sound = False
        if not sound:
            raise UserError(f"{path} is damaged: {remedy}")
        return manifest


def _plain(value: Any) -> Any:
    """Convert nested mappings and sequences (Hydra's included) as plain JSON, without `_target_`."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k != "_target_"}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def normalised(settings: Json, defaults: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return the settings as they are compared: {dotted name: value} without what is null, empty or at its default."""
    known = DEFAULTS if defaults is None else defaults
    fields = flatten(settings)
    return {
        name: value
        for name, value in fields.items()
        # Sweeps repeat settings, and YAML files gain lines: what says nothing must not part a store from its settings.
        if value not in (None, {}, []) and not (name in known and value == known[name])
    }


def store_settings(cfg: Mapping[str, Any]) -> Json:
    """Return the model, text and packing of a resolved configuration,
    less what does not name numbers (device, `_target_`)."""
    settings: Json = {group: _plain(cfg[group]) for group in ("model", "text", "packing")}
    # Where the model ran is in each commit record (`made_by`). Two devices may differ in the last bit of an activation,
    # but a user who moves from one to the other means the same store; `harvest.units.refuse_mixed` says when they must
    # not mix.
    for name in ("device", "device_map", "tp_plan"):
        settings["model"].pop(name, None)
    return settings
