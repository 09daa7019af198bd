"""Capture and replace the activations of a language model at one named point.

`resid_pre`, `resid_mid`, `resid_post` are the residual stream before, inside and after a block; `attn_out` and
`mlp_out` are what the block adds to it, after a post-norm and a multiplier where there are such. So resid_mid =
resid_pre + attn_out and resid_post = resid_mid + mlp_out; in parallel blocks, which have no resid_mid, the three add
up at once. Only where the stream itself is changed (the norms of OPT 350m after the sums, the scale of Gemma 4 after
the second) that stands between.

`attn_in` and `mlp_in` are what attention and the MLP read, after the norm before them where there is one: attn_out is
a function of attn_in, and mlp_out of mlp_in. What is put there is read by that module alone, not by the skip path.

Where a block reads and adds is in harvest/families.py, and the proof that it does in harvest/proof.py.
Letters: B sequences, T tokens, D width of the site.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.base.errors import UserError
from data.base.sites import SITE_KINDS, Site, choices, nearest_site
from harvest.lm import input_device
from harvest.proof import Edit, Place, find_place, model_type

__all__ = ["SITE_KINDS", "HookPoint", "Site", "capture", "locate", "replace", "run_to"]


@dataclass(frozen=True, eq=False)
class HookPoint:
    """One point of one model: the input or the output (`end` "in", "out") of `module`, to be read or changed.

    shared: the tensor is read or written elsewhere too, so an edit is given a copy. for_all_readers: at an "in" end a
    replacement is written into it, for the skip path to read. multiplier: the site is this many times the tensor.
    """

    model: nn.Module
    site: Site
    module: nn.Module
    end: str
    shared: bool = False
    for_all_readers: bool = False
    multiplier: Any = 1.0

    def attach(self, edit: Edit) -> list[RemovableHandle]:
        """Call `edit` with [B, T, D] here in every forward of the model; a tensor it returns goes in its stead.

        UserError for a model in training mode (dropout would make the numbers random).
        """
        if self.model.training:
            raise UserError(f"site {self.site}: the model is in training mode, call model.eval() first")
        lead: list[int] = []

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = args[0] if args else kwargs.get("input_ids")
            # B and T are taken from the model's own input: a module may flatten its tokens, and only this tells how
            # they were.
            lead[:] = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[:2]

        def apply(x: Tensor) -> Tensor | None:
            if not lead:
                raise UserError(f"site {self.site}: this module ran twice in a forward, or outside of one of the model")
            x_BTD = self._rows(x, *lead)
            # Emptied when the site has been seen, so a second call in one forward, or none at all, does not pass
            # unseen.
            lead.clear()
            scaled_BTD = self._scale(x_BTD)
            new_BTD = edit(scaled_BTD.clone() if self.shared else scaled_BTD)
            if new_BTD is None:
                return None
            if new_BTD.shape != x_BTD.shape:
                raise ValueError(f"site {self.site}: the replacement of {[*x_BTD.shape]} has shape {[*new_BTD.shape]}")
            new_BTD = self._unscale(new_BTD.to(device=x.device, dtype=x.dtype), x_BTD, scaled_BTD)
            if self.shared and not self.for_all_readers:
                new_BTD = new_BTD.clone()  # the model may write into it, and it may be the caller's own
            return new_BTD.reshape(x.shape)

        def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if lead and output is not None:  # None: stopped before this site
                raise UserError(f"site {self.site}: this module is not run in a forward of the model")

        return [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self._before(apply) if self.end == "in" else self._after(apply),
            self.model.register_forward_hook(finish),
        ]

    def _scale(self, x_BTD: Tensor) -> Tensor:
        """Give what the block adds: it multiplies the module's output by a number, which is 1 almost everywhere."""
        if _is_one(self.multiplier):
            return x_BTD
        scaled_BTD: Tensor = x_BTD * self.multiplier
        return scaled_BTD

    def _unscale(self, new_BTD: Tensor, x_BTD: Tensor, scaled_BTD: Tensor) -> Tensor:
        """Give what the block multiplies to add `new_BTD`; where that is the old value, the old tensor's bits."""
        if _is_one(self.multiplier):
            return new_BTD
        quotient_BTD = new_BTD / self.multiplier
        # (x * m) / m may differ from x in its last bit. The quotient is within a rounding of x, so their difference is
        # exact, and gradients pass through the quotient alone.
        rounding_BTD = torch.where(new_BTD == scaled_BTD, x_BTD - quotient_BTD, 0).detach()
        old_or_new_BTD: Tensor = quotient_BTD + rounding_BTD
        return old_or_new_BTD

    def _before(self, apply: Edit) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs.get("hidden_states")
            if not args and "hidden_states" not in kwargs:
                names = ", ".join(kwargs) or "nothing"
                raise UserError(
                    f"site {self.site}: this module is called with {names} by name, of which none is hidden_states: "
                    "name the output of the module before it"
                )
            if not isinstance(x, Tensor):
                raise UserError(f"site {self.site}: this module reads a {type(x).__name__}, not a tensor")
            new = apply(x)
            if new is None:
                return None
            # The skip path reads the same tensor after this block's norm has: a new tensor would reach the norm only.
            if self.for_all_readers:
                x.copy_(new)
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        handle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        hooks = self.module._forward_pre_hooks
        if self.for_all_readers:
            # Before those that give this module a tensor of its own: what is written there the skip path never reads.
            for later in [key for key, other in hooks.items() if hasattr(other, "for_this_module")]:
                hooks[later] = hooks.pop(later)
        else:
            hook.for_this_module = True  # type: ignore[attr-defined]
        return handle

    def _after(self, apply: Edit) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            x = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(x, Tensor):
                raise UserError(f"site {self.site}: this module puts out a {type(output).__name__}, not a tensor")
            new = apply(x)
            return new if new is None or x is output else type(output)((new, *output[1:]))

        return self.module.register_forward_hook(hook)

    def _rows(self, x: Tensor, n_sequences: int, n_tokens: int) -> Float[Tensor, "B T D"]:
        """Return the tensor as [B, T, D], whether the module flattens its tokens, splits its heads, or neither."""
        split = x.shape[:2] == (n_sequences, n_tokens)
        if not x.is_floating_point() or not (split or (x.ndim == 2 and x.shape[0] == n_sequences * n_tokens)):
            does = "reads" if self.end == "in" else "puts out"
            raise UserError(
                f"site {self.site}: this module {does} {[*x.shape]}, not one vector for each of "
                f"{n_sequences} x {n_tokens} tokens"
            )
        return x.reshape(n_sequences, n_tokens, -1)


def _is_one(multiplier: Any) -> bool:
    return isinstance(multiplier, int | float) and multiplier == 1


class _Stop(Exception):
    """Every site wanted was read: the rest of the forward is not needed."""


def locate(model: nn.Module, site: Site) -> HookPoint:
    """Find a site in a model; UserError for an unknown module, a layer out of range, an architecture without it."""
    if site.path is not None:
        try:
            module = model.get_submodule(site.path)
        except AttributeError:
            hint = f"{nearest_site(site.path)}name {choices()}"
            raise UserError(f"site {site.path!r} is not in this {model_type(model)} model: {hint}") from None
        if site.kind == "module_in":
            # Others may read the tensor too, or write into it later.
            return HookPoint(model, site, module, "in", shared=True)
        return HookPoint(model, site, module, "out")
    return _hook_point(model, site, find_place(model, site, functools.partial(_probe, model)))


def _hook_point(model: nn.Module, site: Site, place: Place) -> HookPoint:
    module = model.get_submodule(place.path)
    return HookPoint(model, site, module, place.end, place.shared, place.for_all_readers, place.multiplier)


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
        # An exception is the only way out of a forward: it skips the layers above and the unembedding.
        if stop and len(seen) == len(places):
            raise _Stop

    with _stoppable(model) if stop else nullcontext(), ExitStack() as stack:
        # A forward that fails halfway must not leave tensors of an earlier batch for the caller to read.
        stack.callback(model.register_forward_pre_hook(lambda module, args: seen.clear()).remove)
        for place in places:
            for handle in place.attach(functools.partial(keep, str(place.site))):
                stack.callback(handle.remove)
        yield seen


def run_to(model: nn.Module, sites: Sequence[Site], input_ids: Integer[Tensor, "B T"]) -> dict[str, Tensor]:
    """Run one forward without gradients, ended after the last site wanted: {str(site): [B, T, D]}."""
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

    # In the instance's own dict, where __call__ finds it: the class, and other models of it, stay as they are.
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


# ---- What the proof in proof.py runs ---------------------------------------------------------------------------------


def _probe(model: nn.Module, places: Mapping[Site, Place], edits: Mapping[Site, Edit]) -> dict[Site, Tensor]:
    """Run a few tokens with edits at some places, as far as the last place: the value of each after its edit."""
    points = {site: _hook_point(model, site, place) for site, place in places.items()}
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x_BTD: Tensor) -> None:
        seen[site] = x_BTD
        if len(seen) == len(points):
            raise _Stop

    with torch.no_grad(), _stoppable(model), ExitStack() as stack:
        # The edits come first, so that what is read behind them is what they put there.
        for site, edit in edits.items():
            for handle in points[site].attach(edit):
                stack.callback(handle.remove)
        for site, point in points.items():
            for handle in point.attach(functools.partial(keep, site)):
                stack.callback(handle.remove)
        model(input_ids=_example_tokens(model), use_cache=False)
    return seen


def _example_tokens(model: nn.Module) -> Integer[Tensor, "1 T"]:
    """Return eight token ids that the embedding has, repeated where it has fewer;
    none that stands for an image or a sound."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    n_tokens = int(embedding.weight.shape[0])
    config = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    reserved = {value for key, value in settings.items() if key.endswith(("token_id", "token_index"))}
    usable = [token for token in range(min(n_tokens, 64)) if token not in reserved] or [0]
    ids = [usable[i % len(usable)] for i in range(8)]
    return torch.tensor([ids], device=input_device(model))
