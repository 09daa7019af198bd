"""From a site's name to a module of a model, with the proof that the model reads and adds there.

A form of harvest/families.py is taken only where a forward of a few tokens adds up bit for bit, before and after every
site of every block is replaced. Where attention and the MLP read is proved apart, when it is first looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from data.base.errors import UserError
from data.base.sites import INPUT_KINDS, STREAM_KINDS, Site
from harvest.families import BLOCK_LISTS, FAMILIES, FORMS, Form

__all__ = ["Edit", "Place", "Probe", "example_path", "find_place", "model_type"]

Edit = Callable[[Tensor], Tensor | None]


# ---- From a site to a module ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where one site of one model is read: the input or output (`end` "in", "out") of the module at `path`.

    shared: the tensor is read or written elsewhere too, so it is copied when it is read. for_all_readers: a replacement
    at an "in" end is written into it, where it would else reach this module alone. multiplier: the site is this many
    times the tensor.
    """

    path: str
    end: str
    shared: bool = False
    for_all_readers: bool = False
    multiplier: Any = 1.0


# One forward with edits at some places; the value of every place, [B, T, D], after its edit.
Probe = Callable[[Mapping[Site, Place], Mapping[Site, Edit]], dict[Site, Tensor]]
_proved: WeakKeyDictionary[nn.Module, tuple[Form, ...] | None] = WeakKeyDictionary()
_proved_inputs: WeakKeyDictionary[nn.Module, dict[Site, Place]] = WeakKeyDictionary()


def find_place(model: nn.Module, site: Site, probe: Probe) -> Place:
    """Find a site of a kind of SITE_KINDS, proved once a model; UserError where the model has no such site."""
    assert site.layer is not None
    if model not in _proved:
        if model.training and _block_list(model) is not None:  # dropout would make the sums random
            raise UserError(f"site {site}: the model is in training mode, call model.eval() first")
        _proved[model] = _prove(model, probe)
    forms, name = _proved[model], model_type(model)
    if forms is None:
        known = "are not known and do not add up" if name not in FAMILIES else "do not add up here"
        raise UserError(
            f"site {site}: the blocks of architecture {name!r} {known} as resid_pre + attn_out + mlp_out, "
            f"so name the path of a module instead{example_path(model, site.layer)}"
        )
    if site.layer >= len(forms):
        raise UserError(f"site {site}: this {name} model has layers 0 to {len(forms) - 1}")
    if site.kind in INPUT_KINDS:
        return _find_input(model, site, forms, probe)
    place = _places(model, {site.layer: forms[site.layer]}).get(site)
    if place is None:
        raise UserError(
            f"site {site}: {name} blocks add attention and MLP in parallel and have no resid_mid, "
            "use resid_pre or resid_post"
        )
    return place


def _find_input(model: nn.Module, site: Site, forms: Sequence[Form], probe: Probe) -> Place:
    """Find an input site, proved once a model; UserError where attention or MLP read more than one tensor."""
    assert site.layer is not None
    if model not in _proved_inputs:
        _proved_inputs[model] = _prove_inputs(model, forms, probe)
    place = _proved_inputs[model].get(site)
    if place is None:
        part = site.kind.removesuffix("_in")
        raise UserError(
            f"site {site}: {part}_out of this {model_type(model)} block is not known to be a function of one tensor, "
            "so name the input of a module in it instead, as in.<path> with a path that begins with "
            f"{_block_list(model)}.{site.layer}"
        )
    return place


def model_type(model: nn.Module) -> str:
    """Give the name of the architecture, that of the language model inside a model which also reads images."""
    config = getattr(model, "config", None)
    if config is None:
        return type(model).__name__
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return str(getattr(text, "model_type", type(model).__name__))


def example_path(model: nn.Module, layer: int) -> str:
    """Give the end of a sentence that names a block's module path, "" where the model has no list of blocks."""
    path = _block_list(model)
    if path is None:
        return ""
    last = len(model.get_submodule(path)) - 1  # type: ignore[arg-type]
    return f", such as {path}.{min(layer, last)} for what that block gives out"


def _block_list(model: nn.Module) -> str | None:
    """Find the path of the model's blocks: one of BLOCK_LISTS,
    else that of its longest list of one class of module."""
    for path in BLOCK_LISTS:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(module, nn.ModuleList):
            return path
    lists = {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
    }
    # An encoder beside the decoder, or a tower for images, has a list too, and mostly a shorter one.
    return max(lists, key=lambda path: lists[path], default=None)


def _places(model: nn.Module, forms: Mapping[int, Form]) -> dict[Site, Place]:
    """Find the places of every site of these layers; AttributeError where a block lacks a module of its form."""
    path = _block_list(model)
    assert path is not None
    places: dict[Site, Place] = {}
    for layer, form in forms.items():
        root = f"{path}.{layer}"
        block = model.get_submodule(root)
        multiplier = 1.0 if form.multiplier is None else getattr(block, form.multiplier)
        if form.stream_scale is not None:
            getattr(block, form.stream_scale)  # a block without it is of another form
        places[Site("resid_pre", layer)] = Place(root, "in")
        if form.mid is not None:
            module, end = form.mid.split(":")
            read = end == "in"  # of the stream itself, which the skip path reads too
            places[Site("resid_mid", layer)] = Place(f"{root}.{_first(block, module)}", end, read, read)
        places[Site("resid_post", layer)] = Place(root, "out")
        attn, mlp = _first(block, form.attn), _first(block, form.mlp)
        places[Site("attn_out", layer)] = Place(f"{root}.{attn}", "out", multiplier=multiplier)
        places[Site("mlp_out", layer)] = Place(f"{root}.{mlp}", "out", shared=form.adds_in_place, multiplier=multiplier)
    return places


def _input_places(model: nn.Module, forms: Sequence[Form]) -> dict[Site, Place]:
    """Find where the blocks' attention and MLP read, as far as they have the modules that their forms name."""
    places: dict[Site, Place] = {}
    for layer, form in enumerate(forms):
        root = f"{_block_list(model)}.{layer}"
        block = model.get_submodule(root)
        ends = {"attn_in": form.attn_in or f"{form.attn}:in", "mlp_in": form.mlp_in or f"{form.mlp}:in"}
        for kind, module_and_end in ends.items():
            module, end = module_and_end.split(":")
            try:
                path = f"{root}.{_first(block, module)}"
            except AttributeError:
                continue
            # In parallel blocks both may read one tensor, and some MLPs read the stream itself.
            places[Site(kind, layer)] = Place(path, end, shared=True)
    return places


def _first(block: nn.Module, alternatives: str) -> str:
    """Find the first of the paths "a|b" at which the block has a module; AttributeError where it has none."""
    for path in alternatives.split("|"):
        try:
            block.get_submodule(path)
        except AttributeError:  # no such name, or None in its stead in a block of another kind
            continue
        return path
    raise AttributeError(alternatives)


# ---- The proof ------------------------------------------------------------------------------------------------------
#
# A site is right if reading it gives the tensor that the block adds (or adds to), and if writing it changes that tensor
# for every reader. Both follow from sums of what is read, because IEEE addition rounds one way: where resid_mid is
# resid_pre + attn_out in every bit, for random-looking numbers, there is no other place where it could have come from.
#   1. On a clean forward the sums hold in every bit. So each site is read where the sum is made, and nothing else is
#      added, scaled or normalised on the way.
#   2. With every site of every block replaced by 1 - x the same sums hold of the new tensors. So a replacement reaches
#      the skip path as well as the module that reads it, also where both read one tensor; 1 - x of a silent module is
#      not silent, so a module that adds nothing cannot pass for another.
#   3. A block is parallel only if its MLP does not read what attention added: with the blocks' inputs held at their
#      clean values and attention's outputs replaced, the MLP's outputs stay the same in every bit. Without this a
#      sequential block whose mid norm has an unknown name would pass, as resid_pre + attn_out + mlp_out adds up there.


def _prove(model: nn.Module, probe: Probe) -> tuple[Form, ...] | None:
    """Find for each block the first form that is true of it, or None where one of them has none."""
    path = _block_list(model)
    if path is None:
        return None
    n_layers = len(model.get_submodule(path))  # type: ignore[arg-type]
    declared = FAMILIES.get(model_type(model))
    # By layer and not by model: blocks of several kinds may take turns.
    chosen: dict[int, Form] = {}
    for form in FORMS if declared is None else declared:
        open_layers = [layer for layer in range(n_layers) if layer not in chosen]
        for layer in _true_of(model, form, open_layers, probe):
            chosen[layer] = form
        if len(chosen) == n_layers:
            return tuple(chosen[layer] for layer in range(n_layers))
    return None


def _true_of(model: nn.Module, form: Form, layers: Iterable[int], probe: Probe) -> set[int]:
    """Choose those of the layers whose blocks have the modules of the form and pass the three parts of the proof."""
    fitting = {layer for layer in layers if _has_modules(model, form, layer)}
    try:
        clean = _read(model, form, fitting, {}, probe)
        fitting = {layer for layer in fitting if _adds_up(model, form, layer, clean, _same)}

        edits: dict[Site, Edit]
        edits = {Site(kind, layer): _turn for layer in fitting for kind in STREAM_KINDS if kind != "resid_post"}
        turned = _read(model, form, fitting, edits, probe)
        fitting = {layer for layer in fitting if _adds_up(model, form, layer, turned, _turn)}

        if form.mid is None:
            # Part 3 of the proof above: attention changed, the block's input not.
            edits = {Site("attn_out", layer): _turn for layer in fitting}
            edits |= {site: _constant(clean[site]) for site in (Site("resid_pre", layer) for layer in fitting)}
            apart = _read(model, form, fitting, edits, probe)
            mlps = {layer: Site("mlp_out", layer) for layer in fitting}
            fitting = {layer for layer, site in mlps.items() if _equal(apart[site], clean[site])}
    except UserError:  # a module that is not run, runs twice, or gives out no vector a token
        return set()
    if model_type(model) in FAMILIES:
        return fitting
    # What is zero or not a number adds up under any form: of an undeclared architecture it proves too little.
    return {layer for layer in fitting if all(_speaks(clean[Site(kind, layer)]) for kind in ("attn_out", "mlp_out"))}


# An input site is right if all that attention or the MLP knows of the stream passes there, and nowhere else:
#   1. With the stream replaced by 1 - x and every input held at its clean value, attn_out and mlp_out stay the same in
#      every bit. So there is no other way from the stream to them.
#   2. With every input replaced by 1 - x they move (unless they are silent). So what is put there is read.


def _prove_inputs(model: nn.Module, forms: Sequence[Form], probe: Probe) -> dict[Site, Place]:
    """Choose those input sites that pass both parts of the proof."""
    streams, inputs = _places(model, dict(enumerate(forms))), _input_places(model, forms)
    proved: dict[Site, Place] = {}
    # One kind at a time, so that what refuses attention's (it ran twice, reads several tensors) leaves the MLP's.
    for kind, output in (("attn_in", "attn_out"), ("mlp_in", "mlp_out")):
        places = {site: place for site, place in inputs.items() if site.kind == kind}
        outputs = {site: Site(output, site.layer) for site in places}
        read = places | {site: streams[site] for site in outputs.values()}
        stream = {site: place for site, place in streams.items() if site.kind in ("resid_pre", "resid_mid")}
        try:
            clean = probe(read, {})
            hold = {site: _constant(clean[site]) for site in places}
            held = probe(stream | read, dict.fromkeys(stream, _turn) | hold)
            turned = probe(read, dict.fromkeys(places, _turn))
        except UserError:  # a module that is not run, runs twice, or is given no vector a token
            continue
        for site, out in outputs.items():
            moves = not _equal(turned[out], clean[out]) or not _speaks(clean[out])
            if _equal(held[out], clean[out]) and moves:
                proved[site] = places[site]
    return proved


def _speaks(x: Tensor) -> bool:
    return bool(x.any() and x.isfinite().all())


def _read(
    model: nn.Module, form: Form, layers: Iterable[int], edits: Mapping[Site, Edit], probe: Probe
) -> dict[Site, Tensor]:
    """Read what every site of these layers holds in one forward, with those edits for which a block has the site."""
    places = _places(model, dict.fromkeys(sorted(layers), form))
    if not places:
        return {}
    return probe(places, {site: edit for site, edit in edits.items() if site in places})


def _has_modules(model: nn.Module, form: Form, layer: int) -> bool:
    try:
        _places(model, {layer: form})
    except AttributeError:
        return False
    return True


def _adds_up(
    model: nn.Module, form: Form, layer: int, seen: Mapping[Site, Tensor], edit: Callable[[Tensor], Tensor]
) -> bool:
    """Return whether what was seen at a block, with resid_mid edited, adds up in every bit."""
    post = seen[Site("resid_post", layer)]
    pre, attn, mlp = (seen[Site(kind, layer)].to(post.device) for kind in ("resid_pre", "attn_out", "mlp_out"))
    if not pre.shape == attn.shape == mlp.shape == post.shape:
        return False  # several streams side by side, and one vector added to each
    if form.mid is None:
        # The order of three summands is the block's own, and decides the last bits.
        return any(_equal(post, total) for total in (pre + attn + mlp, pre + mlp + attn, attn + mlp + pre))
    mid = seen[Site("resid_mid", layer)].to(post.device)
    first, second = pre + attn, mid + mlp
    block = model.get_submodule(f"{_block_list(model)}.{layer}")
    if form.stream_scale is not None:
        second = second * getattr(block, form.stream_scale)
    if form.norms is not None:
        with torch.no_grad():
            first = block.get_submodule(form.norms[0])(first)
            second = block.get_submodule(form.norms[1])(second)
    return _equal(mid, edit(first)) and _equal(post, second)


def _equal(x: Tensor, y: Tensor) -> bool:
    """Return whether all numbers are equal; where a broken weight makes one NaN, so must the other be.

    The harvest reports such a weight by its site, token and text, which no refusal here could.
    """
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


def _same(x: Tensor) -> Tensor:
    return x


def _turn(x: Tensor) -> Tensor:
    return 1 - x


def _constant(value: Tensor) -> Edit:
    return lambda x: value
