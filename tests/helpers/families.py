"""One tiny random model of each architecture, and where a reader of its code finds that it adds to the stream.

The paths here are written by hand, from each architecture's `forward`: they are what harvest/families.py is checked
against, so nothing is taken from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LAYERS, WIDTH = 61, 2, 32
SEQUENTIAL, PARALLEL, NORMED_STREAM, REFUSED = "sequential", "parallel", "normed stream", "refused"


@dataclass(frozen=True)
class Tiny:
    """A tiny model, and what its blocks do. A path "a|b" gives a block the first of the modules that it has.

    kind: `model_type`. settings: of its config. mid: "<module>:in" or ":out", "" in a parallel block.
    multiplier: what attn_out and mlp_out are multiplied by before they are added. norms: of a stream that is normed.
    stream_scale: what the sum is multiplied by after the MLP; `build` sets it, as it is 1 in a new model.
    image_text: the model is one that AutoModelForCausalLM does not know.
    attn_in, mlp_in: where attention and the MLP read, as `mid`; "" for the input of `attn` and `mlp`, "refused" where
    it is not one tensor.
    """

    kind: str
    settings: dict[str, Any]
    blocks: str = "model.layers"
    attn: str = "self_attn"
    mlp: str = "mlp"
    mid: str = "post_attention_layernorm:in"
    form: str = SEQUENTIAL
    multiplier: float = 1.0
    norms: tuple[str, str] | None = None
    stream_scale: float = 1.0
    image_text: bool = False
    attn_in: str = ""
    mlp_in: str = ""

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model in eval mode, its weights, biases and norms moved far enough from 0 and 1 for each to matter."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        torch.manual_seed(0)
        config = AutoConfig.for_model(self.kind, **self.settings)
        model = (AutoModelForImageTextToText if self.image_text else AutoModelForCausalLM).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("layer_scalar"):
                    buffer.fill_(self.stream_scale)
        return model.to(dtype).eval().requires_grad_(False)

    def block(self, model: nn.Module, layer: int) -> nn.Module:
        return model.get_submodule(f"{self.blocks}.{layer}")


def first_of(block: nn.Module, path: str) -> nn.Module:
    """The module at the first of the paths "a|b" that the block has."""
    for alternative in path.split("|"):
        try:
            return block.get_submodule(alternative)
        except AttributeError:
            continue
    raise AttributeError(path)


def tokens(n_sequences: int = 2, n_tokens: int = 10) -> Tensor:
    return torch.randint(3, 30, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


# ---- Settings -------------------------------------------------------------------------------------------------------

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **ENDS,
}
ROPE = PLAIN | {"num_key_value_heads": 2}
HEADS = ROPE | {"head_dim": 8}
GPT = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64} | ENDS
GEMMA = HEADS | {"sliding_window": 4, "query_pre_attn_scalar": 8}
GEMMA4 = HEADS | {"global_head_dim": 8, "sliding_window": 4, "num_kv_shared_layers": 0}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MARKS = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}

MODULES = {"attn_in": "self_attn:in", "mlp_in": "mlp:in"}
POST_NORM = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm", **MODULES}
GEMMA_BLOCK = POST_NORM | {"mid": "pre_feedforward_layernorm:in"}
GPT_BLOCK = {"blocks": "transformer.h", "attn": "attn", "mid": "ln_2:in"}
GPTJ_BLOCK = {"blocks": "transformer.h", "attn": "attn", "mid": "", "form": PARALLEL}
FALCON = PLAIN | {"num_kv_heads": 2}
FALCON_BLOCK = {"blocks": "transformer.h", "attn": "self_attention"}
OPT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 64, "ffn_dim": 48, **ENDS}
OPT_BLOCK = {"blocks": "model.decoder.layers", "mlp": "fc2", "mlp_in": "fc1:in"}
STREAM_NORMS = ("self_attn_layer_norm", "final_layer_norm")
LFM = HEADS | {"layer_types": ["conv", "full_attention"]}

# The commonest: checked in the fast suite too.
COMMON = ["llama", "gemma2", "olmo2", "gpt_neox", "opt post norms", "granite", "falcon", "apertus", "gemma3 image"]

TINY: dict[str, Tiny] = {
    # One form for most of the field: attention, then an MLP behind post_attention_layernorm.
    "llama": Tiny("llama", ROPE),
    "mistral": Tiny("mistral", ROPE | {"sliding_window": 4}),
    "ministral": Tiny("ministral", HEADS | {"sliding_window": 4}),
    "mixtral": Tiny("mixtral", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Tiny("qwen2", ROPE),
    "qwen2_moe": Tiny("qwen2_moe", ROPE | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16}),
    "qwen3": Tiny("qwen3", HEADS),
    "qwen3_moe": Tiny("qwen3_moe", HEADS | EXPERTS | {"num_experts": 4}),
    "gemma": Tiny("gemma", HEADS),
    "phi3": Tiny("phi3", ROPE),
    "phimoe": Tiny("phimoe", ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "starcoder2": Tiny("starcoder2", ROPE),
    "persimmon": Tiny("persimmon", PLAIN),
    "nemotron": Tiny("nemotron", ROPE),
    "olmo": Tiny("olmo", ROPE),
    "olmoe": Tiny("olmoe", ROPE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "arcee": Tiny("arcee", HEADS),
    "helium": Tiny("helium", HEADS),
    "smollm3": Tiny("smollm3", ROPE),
    "seed_oss": Tiny("seed_oss", HEADS),
    "ernie4_5": Tiny("ernie4_5", HEADS),
    "glm": Tiny("glm", HEADS),
    "glm4_moe": Tiny("glm4_moe", HEADS | EXPERTS | ROUTED),
    "gpt_oss": Tiny("gpt_oss", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "deepseek_v2": Tiny("deepseek_v2", ROPE | {"num_key_value_heads": 4} | EXPERTS | ROUTED | LATENT),
    "deepseek_v3": Tiny("deepseek_v3", ROPE | {"num_key_value_heads": 4} | EXPERTS | ROUTED | LATENT),
    "hunyuan_v1_dense": Tiny("hunyuan_v1_dense", HEADS),
    "bitnet": Tiny("bitnet", ROPE),
    "diffllama": Tiny("diffllama", ROPE),
    "minimax_m2": Tiny("minimax_m2", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4}),
    "stablelm": Tiny("stablelm", ROPE),
    "stablelm parallel": Tiny("stablelm", ROPE | {"use_parallel_residual": True}, mid="", form=PARALLEL),
    "jetmoe": Tiny(
        "jetmoe", ROPE | {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, attn="self_attention"
    ),
    "llama4_text": Tiny(
        "llama4_text",
        HEADS | {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1]},
        mlp="feed_forward",
    ),
    "qwen3_next": Tiny(
        "qwen3_next",
        HEADS | EXPERTS | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 16},
        attn="linear_attn|self_attn",
    ),
    "qwen3_5_text": Tiny("qwen3_5_text", HEADS | LINEAR, attn="linear_attn|self_attn"),
    # The same with norms of other names, and norms behind attention and MLP.
    "apertus": Tiny("apertus", HEADS, mid="feedforward_layernorm:in"),
    "vaultgemma": Tiny("vaultgemma", GEMMA, mid="pre_feedforward_layernorm:in"),
    "gemma2": Tiny("gemma2", GEMMA, **GEMMA_BLOCK),
    "gemma3_text": Tiny("gemma3_text", GEMMA, **GEMMA_BLOCK),
    "olmo2": Tiny("olmo2", ROPE, **POST_NORM, mid="mlp:in"),
    "olmo3": Tiny("olmo3", ROPE | {"sliding_window": 4}, **POST_NORM, mid="mlp:in"),
    "exaone4": Tiny("exaone4", HEADS | {"sliding_window": 4}, **POST_NORM, mid="mlp:in"),
    "flex_olmo": Tiny("flex_olmo", ROPE | {"num_experts": 4, "num_experts_per_tok": 2}, **POST_NORM, mid="mlp:in"),
    "glm4": Tiny("glm4", HEADS, attn="post_self_attn_layernorm", mlp="post_mlp_layernorm", **MODULES),
    "afmoe": Tiny(
        "afmoe",
        HEADS | EXPERTS | {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 4},
        attn="post_attention_layernorm",
        mlp="post_mlp_layernorm",
        mid="pre_mlp_layernorm:in",
        **MODULES,
    ),
    "modernbert-decoder": Tiny(
        "modernbert-decoder", PLAIN | {"cls_token_id": 1, "sep_token_id": 2}, attn="attn", mid="mlp_norm:in"
    ),
    # A convolution or a recurrence in the place of attention.
    "lfm2": Tiny("lfm2", LFM, attn="conv|self_attn", mlp="feed_forward", mid="ffn_norm:in"),
    "jamba": Tiny(
        "jamba",
        ROPE
        | {"num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_d_state": 8}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        attn="mamba|self_attn",
        mlp="feed_forward",
        mid="pre_ff_layernorm:in",
    ),
    "bamba": Tiny(
        "bamba",
        ROPE | MAMBA | {"attn_layer_indices": [1]},
        attn="mamba|self_attn",
        mlp="feed_forward",
        mid="pre_ff_layernorm:in",
    ),
    "recurrent_gemma": Tiny(
        "recurrent_gemma",
        HEADS | {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        attn="temporal_block",
        mlp="mlp_block",
        mid="channel_pre_norm:in",
    ),
    # A number by which attention and MLP are multiplied before they are added.
    "granite": Tiny("granite", ROPE | {"residual_multiplier": 0.22}, multiplier=0.22),
    "granitemoe": Tiny(
        "granitemoe",
        ROPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.3},
        mlp="block_sparse_moe",
        multiplier=0.3,
    ),
    "granitemoehybrid dense": Tiny(
        "granitemoehybrid",
        ROPE
        | MAMBA
        | {"num_local_experts": 0, "shared_intermediate_size": 48, "residual_multiplier": 0.3}
        | {"layer_types": ["mamba", "attention"]},
        attn="mamba|self_attn",
        mlp="shared_mlp",
        multiplier=0.3,
    ),
    "minicpm3": Tiny(
        "minicpm3",
        ROPE | {"num_key_value_heads": 4} | LATENT | {"scale_depth": 1.4},
        multiplier=1.4 / LAYERS**0.5,
    ),
    "hyperclovax": Tiny(
        "hyperclovax",
        HEADS | {"residual_multiplier": 0.5, "use_post_norm": True},
        attn="post_norm1",
        mlp="post_norm2",
        multiplier=0.5,
        **MODULES,
    ),
    # The stream is multiplied by a number after the MLP is added.
    "gemma4_text": Tiny(
        "gemma4_text",
        GEMMA4 | {"hidden_size_per_layer_input": 0},
        **GEMMA_BLOCK,
        stream_scale=0.75,
    ),
    "gemma4_text experts": Tiny(
        "gemma4_text",
        GEMMA4
        | {"hidden_size_per_layer_input": 0, "enable_moe_block": True}
        | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
        # Its experts read the stream through a norm of their own, and what both give is normed together.
        **(GEMMA_BLOCK | {"mlp_in": "refused"}),
        stream_scale=0.75,
    ),
    # The older ones.
    "gpt2": Tiny("gpt2", GPT, **GPT_BLOCK),
    "gpt_bigcode": Tiny("gpt_bigcode", GPT, **GPT_BLOCK),
    "gpt_neo": Tiny(
        "gpt_neo",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 4, "window_size": 4}
        | {"max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]], **ENDS},
        **GPT_BLOCK,
    ),
    "gpt_neox": Tiny("gpt_neox", PLAIN, blocks="gpt_neox.layers", attn="attention", mid="", form=PARALLEL),
    "gpt_neox sequential": Tiny(
        "gpt_neox", PLAIN | {"use_parallel_residual": False}, blocks="gpt_neox.layers", attn="attention"
    ),
    "gptj": Tiny("gptj", GPT | {"rotary_dim": 4}, **GPTJ_BLOCK),
    "codegen": Tiny("codegen", GPT | {"rotary_dim": 4}, **GPTJ_BLOCK),
    "phi": Tiny("phi", PLAIN, mid="", form=PARALLEL),
    "cohere": Tiny("cohere", ROPE, mid="", form=PARALLEL),
    "cohere2": Tiny("cohere2", HEADS | {"sliding_window": 4}, mid="", form=PARALLEL),
    "falcon": Tiny("falcon", FALCON, **FALCON_BLOCK, mid="", form=PARALLEL),
    "falcon sequential": Tiny("falcon", FALCON | {"parallel_attn": False, "alibi": True}, **FALCON_BLOCK),
    "falcon two norms": Tiny(
        "falcon", FALCON | {"new_decoder_architecture": True}, **FALCON_BLOCK, mid="", form=PARALLEL
    ),
    "falcon one norm": Tiny(
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        **FALCON_BLOCK,
        mid="",
        form=PARALLEL,
    ),
    "bloom": Tiny(
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4, **ENDS},
        blocks="transformer.h",
        attn="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        attn_in="input_layernorm:out",
        mlp_in="post_attention_layernorm:out",
    ),
    "mpt": Tiny(
        "mpt",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64, **ENDS},
        blocks="transformer.blocks",
        attn="attn",
        mlp="ffn.down_proj",
        mlp_in="ffn.up_proj:in",
        mid="norm_2:in",
    ),
    "dbrx": Tiny(
        "dbrx",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64, **ENDS}
        | {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}
        | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
        blocks="transformer.blocks",
        attn="norm_attn_norm.attn",
        mlp="ffn",
        mid="norm_attn_norm.norm_2:in",
    ),
    "ctrl": Tiny(
        "ctrl",
        {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "dff": 48, "n_layer": LAYERS, "n_head": 4},
        blocks="transformer.h",
        attn="multi_head_attention",
        mlp="ffn",
        mid="layernorm2:in",
        attn_in="layernorm1:out",
    ),
    "opt": Tiny("opt", OPT | {"word_embed_proj_dim": WIDTH}, **OPT_BLOCK, mid="final_layer_norm:in"),
    "biogpt": Tiny("biogpt", PLAIN, blocks="biogpt.layers", mlp="fc2", mlp_in="fc1:in", mid="final_layer_norm:in"),
    "xglm": Tiny(
        "xglm",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "ffn_dim": 48, "num_layers": LAYERS, "attention_heads": 4, **ENDS},
        mlp="fc2",
        mlp_in="fc1:in",
        mid="final_layer_norm:in",
    ),
    # The stream itself is normalised after each sum.
    "opt post norms": Tiny(
        "opt",
        OPT | {"word_embed_proj_dim": 24, "do_layer_norm_before": False},
        **OPT_BLOCK,
        mid="self_attn_layer_norm:out",
        form=NORMED_STREAM,
        norms=STREAM_NORMS,
    ),
    "openai-gpt": Tiny(
        "openai-gpt",
        GPT,
        blocks="transformer.h",
        attn="attn",
        mid="ln_1:out",
        form=NORMED_STREAM,
        norms=("ln_1", "ln_2"),
    ),
    # The language model inside one that reads images too.
    "gemma3 image": Tiny(
        "gemma3",
        {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 40},
        blocks="model.language_model.layers",
        **GEMMA_BLOCK,
    ),
    "llava image": Tiny(
        "llava",
        {"text_config": ROPE | {"model_type": "llama"}, "image_token_index": 40}
        | {"vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16}},
        blocks="model.language_model.layers",
        image_text=True,
    ),
    "mistral3 image": Tiny(
        "mistral3",
        {"text_config": HEADS | {"model_type": "mistral"}, "image_token_index": 40}
        | {"vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}},
        blocks="model.language_model.layers",
        image_text=True,
    ),
    "qwen2_vl image": Tiny(
        "qwen2_vl",
        {
            "text_config": ROPE | {"rope_parameters": QWEN_ROPE},
            "vision_config": QWEN_VISION | {"mlp_ratio": 2},
            **MARKS,
        },
        blocks="model.language_model.layers",
        image_text=True,
    ),
    "qwen2_5_vl image": Tiny(
        "qwen2_5_vl",
        {"text_config": ROPE | {"rope_parameters": QWEN_ROPE}, **MARKS}
        | {"vision_config": {"depth": 1, "hidden_size": 16, "out_hidden_size": WIDTH, "num_heads": 2}},
        blocks="model.language_model.layers",
        image_text=True,
    ),
    "qwen3_vl image": Tiny(
        "qwen3_vl",
        {"text_config": HEADS | {"rope_parameters": QWEN_ROPE}, **MARKS}
        | {
            "vision_config": {"depth": 1, "hidden_size": 16, "out_hidden_size": WIDTH, "num_heads": 2}
            | {"intermediate_size": 16, "deepstack_visual_indexes": [0]}
        },
        blocks="model.language_model.layers",
        image_text=True,
    ),
    "llama4 image": Tiny(
        "llama4",
        {"text_config": HEADS | {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1}}
        | {"vision_config": VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}},
        mlp="feed_forward",
    ),
    # Refused: their blocks do not add one output of attention and one of an MLP to one stream.
    "gemma4_text layer inputs": Tiny(
        "gemma4_text",
        GEMMA4 | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
        form=REFUSED,
    ),
    "mamba": Tiny("mamba", PLAIN | {"state_size": 8}, blocks="backbone.layers", form=REFUSED),
    "doge": Tiny("doge", ROPE, form=REFUSED),
    "minimax": Tiny(
        "minimax",
        HEADS
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]},
        form=REFUSED,
    ),
    "falcon_h1": Tiny(
        "falcon_h1",
        HEADS | MAMBA | {"mamba_d_ssm": 64, "mamba_expand": 2},
        form=REFUSED,
    ),
    "granitemoehybrid": Tiny(
        "granitemoehybrid",
        ROPE
        | MAMBA
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}
        | {"layer_types": ["mamba", "attention"]},
        form=REFUSED,
    ),
}
