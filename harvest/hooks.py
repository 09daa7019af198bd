"""Capture and replace the activations of a language model at one named point.

`resid_pre`, `resid_mid`, `resid_post` are the residual stream before, inside and after a block; `attn_out` and
`mlp_out` are what the block adds to it, after a post-norm where there is one. So resid_mid = resid_pre + attn_out and
resid_post = resid_mid + mlp_out; in parallel blocks, which have no resid_mid, the three add up at once. Only where the
stream itself is normalised (OPT with its norms after the sums) a norm stands between.

Where a block reads and adds is declared below, once a family. An architecture that is not declared is taken only if
the shape of one that is fits its blocks and a forward of a few tokens adds up bit for bit; else it is refused by name.
Letters: B sequences, T tokens, D width of the site.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.base.errors import UserError
from data.base.sites import KINDS, Site, choices

__all__ = ["KINDS", "HookPoint", "Site", "capture", "locate", "replace", "run_to"]

Edit = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Family:
    """Where the blocks of a family add to the residual stream.

    blocks: path of the list of blocks.  attn, mlp: the module in a block whose output is added.
    mid: "<module>:in" where a module reads the stream between attention and MLP (the skip path reads the same tensor),
    "<module>:out" where one makes it, None where there is no such point. With `switch`, an attribute of the block,
    `mid` holds where that is true and `mid_off` where it is false.
    """

    blocks: str
    attn: str
    mlp: str
    mid: str | None
    switch: str | None = None
    mid_off: str | None = None

    def middle(self, block: nn.Module) -> str | None:
        """The point `mid` of this block."""
        return self.mid if self.switch is None or getattr(block, self.switch) else self.mid_off


_GPT2 = Family("transformer.h", "attn", "mlp", "ln_2:in")
_LLAMA = Family("model.layers", "self_attn", "mlp", "post_attention_layernorm:in")
_GEMMA = Family(
    "model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm:in"
)
# The dropouts before the sums (one for both in Phi) change nothing in eval mode, which `attach` requires.
_PHI = Family("model.layers", "self_attn", "mlp", None)
_NEOX = Family(
    "gpt_neox.layers", "attention", "mlp", None, switch="use_parallel_residual", mid_off="post_attention_layernorm:in"
)
# With its norms after the sums (350m) the stream is what the norms give out; attn_out and mlp_out go in before them.
_OPT = Family(
    "model.decoder.layers",
    "self_attn",
    "fc2",
    "final_layer_norm:in",
    switch="do_layer_norm_before",
    mid_off="self_attn_layer_norm:out",
)

FAMILIES = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi": _PHI,
    "gpt_neox": _NEOX,
    "opt": _OPT,
}
# Norms after attention and MLP only (OLMo 2): the MLP reads the stream itself.
_POST_NORM = Family("model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "mlp:in")
_UNDECLARED = (_GEMMA, _POST_NORM, _LLAMA, _PHI, _GPT2)
_inferred: WeakKeyDictionary[nn.Module, Family | None] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class HookPoint:
    """One point of one model: the input or the output (`end` "in", "out") of `module`, to be read or changed.

    `shared`: the tensor at an "in" end is also read by a skip path, so a replacement is written into it.
    """

    model: nn.Module
    site: Site
    module: nn.Module
    end: str
    shared: bool = False

    def attach(self, edit: Edit) -> list[RemovableHandle]:
        """Call `edit` with [B, T, D] here in every forward of the model; a tensor it returns goes in its stead.

        UserError for a model in training mode (dropout would make the numbers random).
        """
        if self.model.training:
            raise UserError(f"site {self.site}: the model is in training mode, call model.eval() first")
        lead: list[int] = []

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args else kwargs.get("input_ids")
            lead[:] = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[:2]

        def apply(x: Tensor) -> Tensor | None:
            if not lead:
                raise UserError(f"site {self.site}: this module ran twice in a forward, or outside of one of the model")
            x_BTD = self._rows(x, *lead)
            lead.clear()
            new_BTD = edit(x_BTD.clone() if self.shared else x_BTD)
            if new_BTD is None:
                return None
            if new_BTD.shape != x_BTD.shape:
                raise ValueError(f"site {self.site}: the replacement of {[*x_BTD.shape]} has shape {[*new_BTD.shape]}")
            return new_BTD.to(device=x.device, dtype=x.dtype).reshape(x.shape)

        def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if lead and output is not None:  # None: stopped before this site
                raise UserError(f"site {self.site}: this module is not run in a forward of the model")

        return [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self._before(apply) if self.end == "in" else self._after(apply),
            self.model.register_forward_hook(finish),
        ]

    def _before(self, apply: Edit) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            new = apply(x)
            if new is None:
                return None
            if self.shared:
                x.copy_(new)
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return self.module.register_forward_pre_hook(hook, with_kwargs=True)

    def _after(self, apply: Edit) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            x = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(x, Tensor):
                raise UserError(f"site {self.site}: this module puts out a {type(output).__name__}, not a tensor")
            new = apply(x)
            return new if new is None or x is output else type(output)((new, *output[1:]))

        return self.module.register_forward_hook(hook)

    def _rows(self, x: Tensor, n_sequences: int, n_tokens: int) -> Float[Tensor, "B T D"]:
        """The tensor as [B, T, D], whether the module flattens its tokens, splits its heads, or neither."""
        split = x.shape[:2] == (n_sequences, n_tokens)
        if not x.is_floating_point() or not (split or (x.ndim == 2 and x.shape[0] == n_sequences * n_tokens)):
            raise UserError(
                f"site {self.site}: this module puts out {[*x.shape]}, not one vector for each of "
                f"{n_sequences} x {n_tokens} tokens"
            )
        return x.reshape(n_sequences, n_tokens, -1)


class _Stop(Exception):
    """Every site wanted was read: the rest of the forward is not needed."""


def locate(model: nn.Module, site: Site) -> HookPoint:
    """Find a site in a model; UserError for an unknown module, a layer out of range, an architecture without it."""
    if site.path is not None:
        try:
            return HookPoint(model, site, model.get_submodule(site.path), "out")
        except AttributeError:
            raise UserError(f"site {site.path!r} is not in this {_kind(model)} model: name {choices()}") from None
    family = _family(model)
    if family is None:
        raise UserError(
            f"site {site}: the blocks of architecture {_kind(model)!r} are not known and do not add up as "
            "resid_pre + attn_out + mlp_out, so name the path of a module instead"
        )
    return _place(model, family, site)


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site], *, stop: bool = True) -> Iterator[dict[str, Tensor]]:
    """Collect {str(site): [B, T, D]} anew in each forward of `model` inside the context.

    With `stop` a forward ends after the last site wanted and `model(...)` returns None.
    """
    places = [locate(model, site) for site in dict.fromkeys(sites)]
    assert places, "capture needs at least one site"
    seen: dict[str, Tensor] = {}

    def keep(name: str, x_BTD: Tensor) -> None:
        seen[name] = x_BTD
        if stop and len(seen) == len(places):
            raise _Stop

    with _stoppable(model) if stop else nullcontext(), ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda module, args: seen.clear()).remove)
        for place in places:
            for handle in place.attach(functools.partial(keep, str(place.site))):
                stack.callback(handle.remove)
        yield seen


def run_to(model: nn.Module, sites: Sequence[Site], input_ids: Integer[Tensor, "B T"]) -> dict[str, Tensor]:
    """One forward without gradients, ended after the last site wanted: {str(site): [B, T, D]}."""
    with torch.no_grad(), capture(model, sites) as seen:
        model(input_ids=input_ids, use_cache=False)
    return dict(seen)


@contextmanager
def replace(model: nn.Module, site: Site, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put fn(x) in the place of the tensor x [B, T, D] that `capture` reads at this site, in each forward of `model`.

    The new tensor is cast to the dtype of the old. With the identity the logits are the clean ones bit for bit.
    """
    handles = locate(model, site).attach(fn)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _stoppable(model: nn.Module) -> Iterator[None]:
    """Let `model(...)` return None when a hook raises _Stop, so that the caller's code goes on after the call."""
    own, inner = model.__dict__.get("forward"), model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except _Stop:
            return None

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _place(model: nn.Module, family: Family, site: Site) -> HookPoint:
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList) and site.layer is not None
    if site.layer >= len(blocks):
        raise UserError(f"site {site}: this {_kind(model)} model has layers 0 to {len(blocks) - 1}")
    block = blocks[site.layer]
    mid = family.middle(block)
    points = {
        "resid_pre": ":in",
        "resid_mid": mid,
        "resid_post": ":out",
        "attn_out": f"{family.attn}:out",
        "mlp_out": f"{family.mlp}:out",
    }
    point = points[site.kind]
    if point is None:
        raise UserError(
            f"site {site}: {_kind(model)} blocks add attention and MLP in parallel and have no resid_mid, "
            "use resid_pre or resid_post"
        )
    path, end = point.split(":")
    return HookPoint(model, site, block.get_submodule(path), end, shared=site.kind == "resid_mid" and end == "in")


def _family(model: nn.Module) -> Family | None:
    """The declared family of a model, else the first undeclared candidate whose forward adds up."""
    if _kind(model) in FAMILIES:
        return FAMILIES[_kind(model)]
    if model not in _inferred:
        _inferred[model] = next((family for family in _UNDECLARED if _adds_up(model, family)), None)
    return _inferred[model]


def _adds_up(model: nn.Module, family: Family) -> bool:
    """Whether every block of the model, run on eight tokens, is bit for bit what the family says of it.

    IEEE addition commutes, so equal bits are to be had in any dtype. Where there is a resid_mid the check is made a
    second time with its sign turned, which proves that the skip path reads the replaced tensor.
    """
    try:
        blocks = model.get_submodule(family.blocks)
        layers = range(len(blocks)) if isinstance(blocks, nn.ModuleList) else range(0)
        kinds = [kind for kind in KINDS if kind != "resid_mid" or family.mid]
        sites = [Site(kind, layer) for layer in layers for kind in kinds]
        for site in sites:
            _place(model, family, site)
    except (AttributeError, UserError):
        return False
    _inferred[model] = family
    try:
        return bool(sites) and all(_sums(model, sites, family, turned) for turned in {False, family.mid is not None})
    except UserError:
        return False
    finally:
        del _inferred[model]


def _sums(model: nn.Module, sites: list[Site], family: Family, turned: bool) -> bool:
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for site in sites if turned else []:
            if site.kind == "resid_mid":
                stack.enter_context(replace(model, site, torch.neg))
        n_rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
        seen = run_to(model, sites, torch.arange(8, device=device).remainder(n_rows).unsqueeze(0))
    for layer in {site.layer for site in sites}:
        pre, post, attn, mlp = (seen[f"{kind}.{layer}"] for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
        if family.mid:
            mid = seen[f"resid_mid.{layer}"]
            fits = torch.equal(mid, -(pre + attn) if turned else pre + attn) and torch.equal(post, mid + mlp)
        else:
            fits = any(torch.equal(post, total) for total in (pre + attn + mlp, pre + mlp + attn, attn + mlp + pre))
        if not (fits and attn.any() and mlp.any()):
            return False
    return True
