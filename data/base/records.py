"""Records as JSON: one text for each value, sealed so that any damage shows, compared field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from data.base.errors import UserError

Json = dict[str, Any]


def canonical(obj: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces; NaN and infinities are refused."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_digest(obj: object) -> str:
    """Return the sha256 of a value's one JSON text."""
    return hashlib.sha256(canonical(obj).encode()).hexdigest()


def seal(obj: Json, indent: int | None = None) -> bytes:
    """Return the JSON bytes of `obj` with a `check` field over all others, so that any damage to the file shows."""
    return (json.dumps(obj | {"check": json_digest(obj)}, indent=indent, ensure_ascii=False) + "\n").encode()


def unseal(data: bytes, path: object, remedy: str) -> Json:
    """Read what `seal` made; a UserError naming the file and the `remedy` where it is damaged."""
    try:
        obj = json.loads(data)
        if isinstance(obj, dict) and obj.pop("check", None) == json_digest(obj):
            return obj
    except ValueError:  # not JSON, or not UTF-8
        pass
    raise UserError(f"{path} is damaged: {remedy}")


def seal_array(metadata: Json) -> bytes:
    """Return a zarr.json that carries the same check in its attributes, beside others,
    where other readers let it be."""
    rest = {key: value for key, value in metadata.items() if key != "attributes"}
    kept = {key: value for key, value in metadata.get("attributes", {}).items() if key != "check"}
    check = json_digest(rest | {"attributes": kept} if kept else rest)
    return json.dumps(rest | {"attributes": kept | {"check": check}}, indent=2, ensure_ascii=False).encode()


def flatten(obj: object, prefix: str = "") -> dict[str, object]:
    """Return {dotted name: value} of nested mappings."""
    if not isinstance(obj, Mapping) or (prefix and not obj):
        return {prefix: obj}
    found: dict[str, object] = {}
    for key, value in obj.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def diff_fields(a: Json, b: Json) -> list[str]:
    """Return the dotted names of the fields that differ, with both values: `packing.context: 128 here, 256 asked`.

    A field that is null is as one that is absent: a setting that was thought of later asks nothing of older records.
    """
    here = {name: value for name, value in flatten(a).items() if value is not None}
    asked = {name: value for name, value in flatten(b).items() if value is not None}

    def show(side: dict[str, object], name: str) -> str:
        return canonical(side[name]) if name in side else "absent"

    names = sorted(here.keys() | asked.keys())
    pairs = ((name, show(here, name), show(asked, name)) for name in names)
    return [f"{name}: {ours} here, {theirs} asked" for name, ours, theirs in pairs if ours != theirs]
