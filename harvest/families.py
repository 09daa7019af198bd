"""Where the blocks of each architecture read and add to the residual stream.

A `Form` is one way to build a block. `FAMILIES` names the forms of each known architecture (by `model_type`), in the
order of trial; an architecture that is not there is tried with every form. Names alone decide nothing: harvest/proof.py
takes a form only where a model's own forward shows it. So a block that a version of transformers builds in another way
is refused, never read at the wrong point.

To add an architecture, give a tiny one to tests/helpers/families.py, watch its test fail, and add its form here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BLOCK_LISTS", "FAMILIES", "FORMS", "Form"]


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
    attn_in, mlp_in: "<path>:in" or ":out", where all that attention (the MLP) reads of the stream passes, behind its
    norm; None where that is the input of the module `attn` (`mlp`).
    """

    attn: str
    mlp: str
    mid: str | None
    multiplier: str | None = None
    norms: tuple[str, str] | None = None
    stream_scale: str | None = None
    adds_in_place: bool = False
    attn_in: str | None = None
    mlp_in: str | None = None


LLAMA = Form("self_attn", "mlp", "post_attention_layernorm:in")
GPT2 = Form("attn", "mlp", "ln_2:in")
GEMMA = Form(
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "pre_feedforward_layernorm:in",
    attn_in="self_attn:in",
    mlp_in="mlp:in",
)
GEMMA4 = Form(
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "pre_feedforward_layernorm:in",
    stream_scale="layer_scalar",
    attn_in="self_attn:in",
    mlp_in="mlp:in",
)
# Norms after attention and MLP only: the MLP reads the stream itself.
OLMO2 = Form(
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "mlp:in",
    attn_in="self_attn:in",
    mlp_in="mlp:in",
)
AFMOE = Form(
    "post_attention_layernorm",
    "post_mlp_layernorm",
    "pre_mlp_layernorm:in",
    attn_in="self_attn:in",
    mlp_in="mlp:in",
)
GLM4 = Form(
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
    "post_attention_layernorm:in",
    attn_in="self_attn:in",
    mlp_in="mlp:in",
)
VAULT_GEMMA = Form("self_attn", "mlp", "pre_feedforward_layernorm:in")
APERTUS = Form("self_attn", "mlp", "feedforward_layernorm:in")
# The dropouts before the sums (one for both in Phi) change nothing in eval mode, which a hook requires.
PHI = Form("self_attn", "mlp", None)
NEOX = Form("attention", "mlp", "post_attention_layernorm:in")
NEOX_PARALLEL = Form("attention", "mlp", None)
GPTJ = Form("attn", "mlp", None)
OPT = Form(
    "self_attn",
    "fc2",
    "final_layer_norm:in",
    mlp_in="fc1:in",
)
# With its norms after the sums (350m) the stream is what the norms give out; attn_out and mlp_out go in before them.
OPT_POST_NORM = Form(
    "self_attn",
    "fc2",
    "self_attn_layer_norm:out",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    mlp_in="fc1:in",
)
GPT1 = Form("attn", "mlp", "ln_1:out", norms=("ln_1", "ln_2"))
# Attention is given the norm's output three times, as queries, keys and values.
CTRL = Form("multi_head_attention", "ffn", "layernorm2:in", attn_in="layernorm1:out")
FALCON = Form("self_attention", "mlp", "post_attention_layernorm:in")
FALCON_PARALLEL = Form("self_attention", "mlp", None, adds_in_place=True)
# The modules `self_attention` and `mlp` of Bloom, and `ffn` of MPT, give out the stream: they add to it themselves.
BLOOM = Form(
    "self_attention.dense",
    "mlp.dense_4h_to_h",
    "post_attention_layernorm:in",
    attn_in="self_attention:in",
    mlp_in="mlp:in",
)
MPT = Form("attn", "ffn.down_proj", "norm_2:in", mlp_in="ffn:in")
GRANITE = Form(
    "self_attn|mamba",
    "mlp|block_sparse_moe|shared_mlp",
    "post_attention_layernorm:in",
    multiplier="residual_multiplier",
)
MINICPM3 = Form("self_attn", "mlp", "post_attention_layernorm:in", multiplier="residual_scale")
HYPERCLOVA = Form(
    "post_norm1",
    "post_norm2",
    "post_attention_layernorm:in",
    multiplier="residual_multiplier",
    attn_in="self_attn:in",
    mlp_in="mlp:in",
)
HYPERCLOVA_PRE_NORM = Form("self_attn", "mlp", "post_attention_layernorm:in", multiplier="residual_multiplier")
JETMOE = Form("self_attention", "mlp", "post_attention_layernorm:in")
MIXTRAL = Form("self_attn", "block_sparse_moe", "post_attention_layernorm:in")
DBRX = Form("norm_attn_norm.attn", "ffn", "norm_attn_norm.norm_2:in")
LLAMA4 = Form("self_attn", "feed_forward", "post_attention_layernorm:in")
LFM2 = Form("self_attn|conv", "feed_forward", "ffn_norm:in")
LFM3 = Form("post_operator_norm", "post_ffn_norm", "ffn_norm:in", attn_in="self_attn|conv:in", mlp_in="feed_forward:in")
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
