"""How sites of a language model are named. No torch here: a name can be refused before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data.base.errors import UserError

STREAM_KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
INPUT_KINDS = ("attn_in", "mlp_in")
SITE_KINDS = (*STREAM_KINDS, *INPUT_KINDS)

# ---- Spellings -------------------------------------------------------------------------------------------------------

_CANONICAL = re.compile(rf"({'|'.join(SITE_KINDS)})\.(\d+)")
_TRANSFORMER_LENS = re.compile(rf"blocks\.(\d+)\.hook_({'|'.join(STREAM_KINDS)})")
# Of its TransformerBridge: what the attention or MLP of the original model is called with.
_BRIDGE_INPUT = re.compile(r"blocks\.(\d+)\.(attn|mlp)\.hook_in")
# Its names that sound like an input site and are another tensor.
_NORMALIZED = re.compile(r"blocks\.(\d+)\.ln([12])(_post)?\.hook_normalized")
_BEFORE_NORM = re.compile(r"blocks\.(\d+)\.hook_(attn|mlp)_in")
_MODULE_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
# `in` is a word of Python, so no module of a model can begin its path with it.
_INPUT_OF = "in."


@dataclass(frozen=True)
class Site:
    """One named point of a model: a kind of `SITE_KINDS` at a layer, or the output (kind "module") or the input (kind
    "module_in") of the module `path`."""

    kind: str
    layer: int | None = None
    path: str | None = None

    @classmethod
    def parse(cls, name: str) -> Site:
        """Read `mlp_in.3`, a name of TransformerLens for the same tensor, a module's path, or `in.` before a path.

        Raises UserError for the rest; of TransformerLens' names for other tensors it says which site is near.
        """
        if canonical := _CANONICAL.fullmatch(name):
            return cls(canonical[1], int(canonical[2]))
        if hook := _TRANSFORMER_LENS.fullmatch(name):
            return cls(hook[2], int(hook[1]))
        if hook := _BRIDGE_INPUT.fullmatch(name):
            return cls(f"{hook[2]}_in", int(hook[1]))
        _refuse_look_alike(name)
        kind, path = ("module_in", name.removeprefix(_INPUT_OF)) if name.startswith(_INPUT_OF) else ("module", name)
        kinds = "|".join(SITE_KINDS)
        if not _MODULE_PATH.fullmatch(path) or path in SITE_KINDS or re.match(rf"({kinds})\.|.*\.hook_|in\.|in$", path):
            raise UserError(f"site {name!r} is not known: name one as {choices()}")
        return cls(kind, path=path)

    def __str__(self) -> str:
        if self.path is None:
            return f"{self.kind}.{self.layer}"
        return f"{_INPUT_OF}{self.path}" if self.kind == "module_in" else self.path


def choices() -> str:
    """Return the end of a sentence that says how a site may be named."""
    kinds = ", ".join(f"{kind}.<layer>" for kind in SITE_KINDS)
    return f"{kinds} or the path of a module of the model, {_INPUT_OF}<path> for its input"


def _refuse_look_alike(name: str) -> None:
    """Raise UserError for a name of TransformerLens that is not quite what attention or the MLP reads."""
    if hook := _NORMALIZED.fullmatch(name):
        near = f"{'attn' if hook[2] == '1' else 'mlp'}_in.{hook[1]}"
        raise UserError(
            f"site {name!r} is taken before the norm's weight and bias are applied, and here they are not folded into "
            f"the module behind it: use {near}, which is what that module reads"
        )
    if hook := _BEFORE_NORM.fullmatch(name):
        stream, near = ("resid_pre" if hook[2] == "attn" else "resid_mid"), f"{hook[2]}_in"
        raise UserError(
            f"site {name!r} is the residual stream before the norm: use {stream}.{hook[1]} for that (resid_pre in "
            f"parallel blocks), or {near}.{hook[1]} for what the module reads after the norm"
        )
