"""Where the blocks of each architecture read and add to the residual stream, and the proof that a model does so.

A `Form` is one way to build a block. `FAMILIES` names the forms of each known architecture (by `model_type`), in the
order of trial; an architecture that is not there is tried with every form. Names alone decide nothing: a form is taken
only where a forward of a few tokens adds up bit for bit, before and after every site of every block is replaced. So a
block that a version of transformers builds in another way is refused, never read at the wrong point.

To add an architecture, give a tiny one to tests/helpers/families.py, watch its test fail, and add its form here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from data.base.errors import UserError
from data.base.sites import SITE_KINDS, Site

__all__ = ["FAMILIES", "FORMS", "Edit", "Form", "Place", "Probe", "example_path", "find_place", "model_type"]

Edit = Callable[[Tensor], Tensor | None]


# ---- The table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """One way to build a block: which of its modules add to the residual stream, and where the stream is between them.

    A path may give alternatives, "self_attn|linear_attn": a block has the first of them that exists in it.

    attn, mlp: path in the block of the module whose output is added.
    mid: "<path>:in" where a module reads the stream between attention and MLP (the skip path reads the same tensor),
    "<path>:out" where one makes it, None where attention and MLP both read the block's input (parallel).
    multiplier: attribute of the block, a number by which both outputs are multiplied before they are added.
    norms: paths of two modules that normalise the stream itself, after the first and after the second sum.
    stream_scale: attribute of the block, a number by which the stream itself is multiplied after the second sum.
    adds_in_place: the block adds into the MLP's output, so what is read there must be a copy.
    """

    attn: str
    mlp: str
    mid: str | None
    multiplier: str | None = None
    norms: tuple[str, str] | None = None
    stream_scale: str | None = None
    adds_in_place: bool = False


LLAMA = Form("self_attn", "mlp", "post_attention_layernorm:in")
GPT2 = Form("attn", "mlp", "ln_2:in")
GEMMA = Form("post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm:in")
GEMMA4 = Form(
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "pre_feedforward_layernorm:in",
    stream_scale="layer_scalar",
)
# Norms after attention and MLP only: the MLP reads the stream itself.
OLMO2 = Form("post_attention_layernorm", "post_feedforward_layernorm", "mlp:in")
AFMOE = Form("post_attention_layernorm", "post_mlp_layernorm", "pre_mlp_layernorm:in")
GLM4 = Form("post_self_attn_layernorm", "post_mlp_layernorm", "post_attention_layernorm:in")
VAULT_GEMMA = Form("self_attn", "mlp", "pre_feedforward_layernorm:in")
APERTUS = Form("self_attn", "mlp", "feedforward_layernorm:in")
# The dropouts before the sums (one for both in Phi) change nothing in eval mode, which a hook requires.
PHI = Form("self_attn", "mlp", None)
NEOX = Form("attention", "mlp", "post_attention_layernorm:in")
NEOX_PARALLEL = Form("attention", "mlp", None)
GPTJ = Form("attn", "mlp", None)
OPT = Form("self_attn", "fc2", "final_layer_norm:in")
# With its norms after the sums (350m) the stream is what the norms give out; attn_out and mlp_out go in before them.
OPT_POST_NORM = Form("self_attn", "fc2", "self_attn_layer_norm:out", norms=("self_attn_layer_norm", "final_layer_norm"))
GPT1 = Form("attn", "mlp", "ln_1:out", norms=("ln_1", "ln_2"))
CTRL = Form("multi_head_attention", "ffn", "layernorm2:in")
FALCON = Form("self_attention", "mlp", "post_attention_layernorm:in")
FALCON_PARALLEL = Form("self_attention", "mlp", None, adds_in_place=True)
# The modules `self_attention` and `mlp` of Bloom, and `ffn` of MPT, give out the stream: they add to it themselves.
BLOOM = Form("self_attention.dense", "mlp.dense_4h_to_h", "post_attention_layernorm:in")
MPT = Form("attn", "ffn.down_proj", "norm_2:in")
GRANITE = Form(
    "self_attn|mamba",
    "mlp|block_sparse_moe|shared_mlp",
    "post_attention_layernorm:in",
    multiplier="residual_multiplier",
)
MINICPM3 = Form("self_attn", "mlp", "post_attention_layernorm:in", multiplier="residual_scale")
HYPERCLOVA = Form("post_norm1", "post_norm2", "post_attention_layernorm:in", multiplier="residual_multiplier")
HYPERCLOVA_PRE_NORM = Form("self_attn", "mlp", "post_attention_layernorm:in", multiplier="residual_multiplier")
JETMOE = Form("self_attention", "mlp", "post_attention_layernorm:in")
MIXTRAL = Form("self_attn", "block_sparse_moe", "post_attention_layernorm:in")
DBRX = Form("norm_attn_norm.attn", "ffn", "norm_attn_norm.norm_2:in")
LLAMA4 = Form("self_attn", "feed_forward", "post_attention_layernorm:in")
LFM2 = Form("self_attn|conv", "feed_forward", "ffn_norm:in")
LFM3 = Form("post_operator_norm", "post_ffn_norm", "ffn_norm:in")
QWEN3_NEXT = Form("self_attn|linear_attn", "mlp", "post_attention_layernorm:in")
JAMBA = Form("self_attn|mamba", "feed_forward", "pre_ff_layernorm:in")
RECURRENT_GEMMA = Form("temporal_block", "mlp_block", "channel_pre_norm:in")
MODERN_BERT = Form("attn", "mlp", "mlp_norm:in")

FAMILIES: dict[str, tuple[Form, ...]] = {
    "gpt2": (GPT2,),
    "gpt_neo": (GPT2,),
    "llama": (LLAMA,),
    "mistral": (LLAMA,),
    "qwen3": (LLAMA,),
    "gemma2": (GEMMA,),
    "gemma3_text": (GEMMA,),
    "gemma4_text": (GEMMA4,),
    "gemma4_unified_text": (GEMMA4,),
    "phi": (PHI,),
    "gpt_neox": (NEOX, NEOX_PARALLEL),
    "opt": (OPT, OPT_POST_NORM),
    "openai-gpt": (GPT1,),
    "ctrl": (CTRL,),
    "gptj": (GPTJ,),
    "codegen": (GPTJ,),
    "falcon": (FALCON, FALCON_PARALLEL),
    "bloom": (BLOOM,),
    "mpt": (MPT,),
    "stablelm": (LLAMA, PHI),
    "apertus": (APERTUS,),
    "vaultgemma": (VAULT_GEMMA,),
    "glm4": (GLM4,),
    "afmoe": (AFMOE,),
    "granite": (GRANITE,),
    "granitemoe": (GRANITE,),
    "granitemoeshared": (GRANITE,),
    "granitemoehybrid": (GRANITE,),
    "minicpm3": (MINICPM3,),
    "hyperclovax": (HYPERCLOVA, HYPERCLOVA_PRE_NORM),
    "jetmoe": (JETMOE,),
    "dbrx": (DBRX,),
    "llama4_text": (LLAMA4,),
    "lfm2": (LFM2,),
    "lfm2_moe": (LFM2,),
    "lfm3": (LFM3,),
    "qwen3_next": (QWEN3_NEXT,),
    "qwen3_5_text": (QWEN3_NEXT,),
    "qwen3_5_moe_text": (QWEN3_NEXT,),
    "olmo_hybrid": (QWEN3_NEXT, OLMO2),
    "jamba": (JAMBA,),
    "bamba": (JAMBA,),
    "recurrent_gemma": (RECURRENT_GEMMA,),
    "modernbert-decoder": (MODERN_BERT,),
}
# For the rest: the commonest first, the parallel ones last. Each is proved, so the order decides only between forms
# that name the same tensors.
FORMS = tuple(
    dict.fromkeys(
        [GEMMA, OLMO2, LLAMA, GPT2, OPT, MIXTRAL]
        + [form for forms in FAMILIES.values() for form in forms if form.mid]
        + [form for forms in FAMILIES.values() for form in forms if not form.mid]
    )
)
# Where the list of blocks is. A model that reads images or sound too has a language model inside.
BLOCK_LISTS = (
    "model.layers",
    "model.language_model.layers",
    "model.text_model.layers",
    "language_model.model.layers",
    "model.decoder.layers",
    "model.language_model.decoder.layers",
    "language_model.model.decoder.layers",
    "gpt_neox.layers",
    "biogpt.layers",
    "transformer.h",
    "transformer.blocks",
)


# ---- From a site to a module ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where one site of one model is read: the input or output (`end` "in", "out") of the module at `path`.

    shared: the tensor is read or written elsewhere too, so it is copied when it is read; at an "in" end a replacement
    is written into it. multiplier: the site is this many times the tensor.
    """

    path: str
    end: str
    shared: bool = False
    multiplier: Any = 1.0


# One forward with edits at some places; the value of every place, [B, T, D], after its edit.
Probe = Callable[[Mapping[Site, Place], Mapping[Site, Edit]], dict[Site, Tensor]]
_proved: WeakKeyDictionary[nn.Module, tuple[Form, ...] | None] = WeakKeyDictionary()


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
    place = _places(model, {site.layer: forms[site.layer]}).get(site)
    if place is None:
        raise UserError(
            f"site {site}: {name} blocks add attention and MLP in parallel and have no resid_mid, "
            "use resid_pre or resid_post"
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
            places[Site("resid_mid", layer)] = Place(f"{root}.{_first(block, module)}", end, shared=end == "in")
        places[Site("resid_post", layer)] = Place(root, "out")
        attn, mlp = _first(block, form.attn), _first(block, form.mlp)
        places[Site("attn_out", layer)] = Place(f"{root}.{attn}", "out", multiplier=multiplier)
        places[Site("mlp_out", layer)] = Place(f"{root}.{mlp}", "out", shared=form.adds_in_place, multiplier=multiplier)
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
        edits = {Site(kind, layer): _turn for layer in fitting for kind in SITE_KINDS if kind != "resid_post"}
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
