"""How sites of a language model are named. No torch here: a name can be refused before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data.base.errors import UserError, did_you_mean

SITE_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_KIND = "|".join(SITE_KINDS)
_CANONICAL = re.compile(rf"({_KIND})\.(\d+)")
_TRANSFORMER_LENS = re.compile(rf"blocks\.(\d+)\.hook_({_KIND})")
_MODULE_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


@dataclass(frozen=True)
class Site:
    """One named point of a model: a kind of `SITE_KINDS` at a layer, or (kind "module") the output of the module
    `path`."""

    kind: str
    layer: int | None = None
    path: str | None = None

    @classmethod
    def parse(cls, name: str) -> Site:
        """Read `resid_post.3`, TransformerLens' `blocks.3.hook_resid_post` or a module path; UserError for the rest."""
        if found := _CANONICAL.fullmatch(name):
            return cls(found[1], int(found[2]))
        if found := _TRANSFORMER_LENS.fullmatch(name):
            return cls(found[2], int(found[1]))
        if not _MODULE_PATH.fullmatch(name) or name in SITE_KINDS or re.match(rf"({_KIND})\.|.*\.hook_", name):
            raise UserError(f"site {name!r} is not known: {nearest_site(name)}name one as {choices()}")
        return cls("module", path=name)

    def __str__(self) -> str:
        return self.path if self.path is not None else f"{self.kind}.{self.layer}"


def nearest_site(name: str) -> str:
    """Return `did you mean resid_post.3? Else ` for a name that is nearly that of a site, or nothing."""
    kind, _, layer = name.partition(".")
    near = did_you_mean(f"{kind}.{layer}", [f"{known}.{layer}" for known in SITE_KINDS]) if layer.isdigit() else ""
    return f"{near} Else " if near else ""


def choices() -> str:
    """Return the end of a sentence that says how a site may be named."""
    return f"{', '.join(f'{kind}.<layer>' for kind in SITE_KINDS)} or the path of a module of the model"
