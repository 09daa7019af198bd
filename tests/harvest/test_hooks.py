"""python -m pytest tests/harvest/test_hooks.py: every site of every architecture, on tiny random models."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.base.errors import UserError
from data.base.sites import STREAM_KINDS
from harvest.hooks import SITE_KINDS, Site, capture, locate, replace, run_to
from tests.helpers.slow import slow_unless

VOCABULARY, LAYERS, WIDTH = 61, 3, 32
PARALLEL = {"phi", "gpt_neox", "cohere"}
_ROPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_PLAIN = {key: value for key, value in _ROPE.items() if key != "num_key_value_heads"}
_GEMMA = _ROPE | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
_GPT_NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_layers": LAYERS,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local", "global"], 1]],
    "window_size": 4,
}
_OPT = {key: value for key, value in _PLAIN.items() if key != "intermediate_size"} | {"ffn_dim": 48}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2 | _ENDS),
    "llama": ("llama", _ROPE),
    "mistral": ("mistral", _ROPE | {"sliding_window": 4}),
    "qwen3": ("qwen3", _ROPE | {"head_dim": 8}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": ("gemma3_text", _GEMMA),
    "phi": ("phi", _PLAIN),
    "gpt_neox": ("gpt_neox", _PLAIN),
    "gpt_neox_serial": ("gpt_neox", _PLAIN | {"use_parallel_residual": False}),
    "gpt_neo": ("gpt_neo", _GPT_NEO | _ENDS),
    "opt": ("opt", _OPT | {"word_embed_proj_dim": WIDTH}),
    "opt_post_norm": ("opt", _OPT | {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
}
# Not declared in harvest/families.py: taken, or refused, by what a forward adds up to.
INFERRED = {"qwen2": ("qwen2", _ROPE), "olmo2": ("olmo2", _ROPE), "cohere": ("cohere", _ROPE)}
REFUSED = {"doge": ("doge", _ROPE)}


@functools.cache
def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """The model in eval mode, its weights, biases and norms moved far enough from 0 and 1 for each to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = (CONFIGS | INFERRED | REFUSED)[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval().requires_grad_(False)


def tokens(n_sequences: int = 2, n_tokens: int = 10) -> Tensor:
    return torch.randint(3, VOCABULARY, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(1))


def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def kinds_of(name: str) -> list[str]:
    return [kind for kind in SITE_KINDS if kind != "resid_mid" or name not in PARALLEL]


def at(kind: str, layer: int) -> Site:
    return Site(kind, layer)


# One architecture of each kind, of which `make test` says all; the rest are for `make test-slow`.
KINDS = {"gpt2", "gemma2", "gpt_neox", "opt_post_norm", "qwen2"}
NAMES = slow_unless(KINDS.__contains__, CONFIGS | INFERRED)
EVERY = slow_unless(
    lambda pair: pair[0] in KINDS, [(name, kind) for name in CONFIGS | INFERRED for kind in kinds_of(name)]
)


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_adds_up(name: str) -> None:
    model, ids = build(name), tokens()
    seen = run_to(model, [at(kind, layer) for kind in kinds_of(name) for layer in range(LAYERS)], ids)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-13)
    for layer in range(LAYERS):
        pre, post, attn, mlp = (seen[f"{kind}.{layer}"] for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
        assert pre.shape == (2, 10, WIDTH) and min(attn.abs().mean(), mlp.abs().mean()) > 0.01
        if name == "opt_post_norm":
            block = model.model.decoder.layers[layer]
            close(block.self_attn_layer_norm(pre + attn), seen[f"resid_mid.{layer}"])
            close(block.final_layer_norm(seen[f"resid_mid.{layer}"] + mlp), post)
            continue
        close(pre + attn + mlp, post)
        if name not in PARALLEL:
            close(pre + attn, seen[f"resid_mid.{layer}"])


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_the_model_s_own_hidden_states(name: str) -> None:
    model, ids = build(name), tokens()
    hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    seen = run_to(model, [at(kind, layer) for kind in ("resid_pre", "resid_post") for layer in range(LAYERS)], ids)
    for layer in range(LAYERS):
        assert torch.equal(seen[f"resid_pre.{layer}"], hidden[layer])
        if layer < LAYERS - 1:  # the last hidden state is taken after the final norm
            assert torch.equal(seen[f"resid_post.{layer}"], hidden[layer + 1])


@pytest.mark.parametrize("name", NAMES)
def test_attention_and_mlp_are_not_confused(name: str) -> None:
    """With the MLP's weights at zero nothing is added by it, and only by it."""
    model = build(name, torch.float32)
    mlps = [p for key, p in model.named_parameters() if ".1." in key and (".mlp." in key or ".fc" in key)]
    kept = [p.clone() for p in mlps]
    assert mlps and locate(model, at("resid_pre", 0))  # before the MLP falls silent: an inference needs its sums
    try:
        for parameter in mlps:
            parameter.zero_()
        seen = run_to(model, [at("attn_out", 1), at("mlp_out", 1), at("mlp_out", 0)], tokens())
    finally:
        for parameter, old in zip(mlps, kept, strict=True):
            parameter.copy_(old)
    assert not seen["mlp_out.1"].any()
    assert seen["attn_out.1"].abs().min() > 0 and seen["mlp_out.0"].any()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_identity_gives_the_clean_logits_bit_for_bit(name: str, kind: str, dtype: torch.dtype) -> None:
    model, ids = build(name, dtype), tokens()
    clean = logits(model, ids)
    for layer in range(LAYERS):
        with replace(model, at(kind, layer), lambda x_BTD: x_BTD):
            assert torch.equal(logits(model, ids), clean)
    assert torch.equal(logits(model, ids), clean)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_replace_is_given_what_capture_reads_and_its_tensor_is_used(name: str, kind: str) -> None:
    model, ids, site = build(name), tokens(), at(kind, 1)
    clean, (captured,) = logits(model, ids), run_to(model, [site], ids).values()
    given: list[Tensor] = []

    def zero(x_BTD: Tensor) -> Tensor:
        given.append(x_BTD.clone())
        return torch.zeros_like(x_BTD)

    with replace(model, site, zero):
        assert (logits(model, ids) - clean).abs().max() > 1e-3
        (after,) = run_to(model, [site], ids).values()
    assert torch.equal(given[0], captured) and not after.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_acts_alike_wherever_it_enters_the_same_sum(name: str) -> None:
    """Adding d to what a block adds is adding d to the stream behind it: so each replacement reaches every reader."""
    model, ids = build(name), tokens()
    shift_D = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)

    def shifted(kind: str, layer: int) -> Tensor:
        with replace(model, at(kind, layer), lambda x_BTD: x_BTD + shift_D):
            return logits(model, ids)

    groups = [[("resid_post", 1), ("resid_pre", 2)]]
    if name in PARALLEL:
        groups[0] += [("attn_out", 1), ("mlp_out", 1)]
    elif name != "opt_post_norm":
        groups = [[*groups[0], ("mlp_out", 1)], [("attn_out", 1), ("resid_mid", 1)]]
    for first, *rest in groups:
        for other in rest:
            torch.testing.assert_close(shifted(*other), shifted(*first), rtol=0, atol=1e-12)
        assert (shifted(*first) - logits(model, ids)).abs().max() > 1e-3


def test_replacing_resid_mid_feeds_the_mlp_and_the_skip_path_of_opt_with_norms_behind() -> None:
    model, ids = build("opt_post_norm"), tokens()
    new_BTD = torch.randn(2, 10, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with replace(model, at("resid_mid", 1), lambda x_BTD: new_BTD):
        (post,) = run_to(model, [at("resid_post", 1)], ids).values()
    block = model.model.decoder.layers[1]
    wanted = block.final_layer_norm(new_BTD + block.fc2(block.activation_fn(block.fc1(new_BTD))))
    torch.testing.assert_close(post, wanted, rtol=0, atol=1e-12)


def test_a_capture_before_a_replacement_keeps_the_old_tensor() -> None:
    model, ids, site = build("llama"), tokens(), at("resid_mid", 1)
    (clean,) = run_to(model, [site], ids).values()
    with capture(model, [site], stop=False) as seen, replace(model, site, torch.zeros_like):
        logits(model, ids)
        assert torch.equal(seen["resid_mid.1"], clean)


@pytest.mark.parametrize("kind", ["resid_mid", "attn_out"])
def test_gradients_pass_through_a_replacement(kind: str) -> None:
    model, ids = build("llama"), tokens()
    gradients = []
    for site in (at(kind, 1), at("attn_out", 1)):
        weight = torch.eye(WIDTH, dtype=torch.float64, requires_grad=True)
        shift = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
        with replace(model, site, lambda x_BTD, w=weight, d=shift: x_BTD @ w + d):
            logits(model, ids).square().sum().backward()
        assert weight.grad is not None and weight.grad.abs().max() > 0
        gradients.append(shift.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_replacement_is_cast_to_the_model_s_dtype_and_must_keep_the_shape() -> None:
    model, ids = build("gpt2", torch.bfloat16), tokens()
    with replace(model, at("resid_post", 0), lambda x_BTD: x_BTD.float()):
        assert logits(model, ids).dtype == torch.bfloat16
    with (
        pytest.raises(ValueError, match=r"resid_post\.0: the replacement of \[2, 10, 32\] has shape \[2, 10, 31\]"),
        replace(model, at("resid_post", 0), lambda x_BTD: x_BTD[..., 1:]),
    ):
        logits(model, ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_stops_after_the_last_site_wanted(name: str) -> None:
    model, ids = build(name, torch.float32), tokens()
    clean = logits(model, ids)
    wanted = [at("attn_out", 1), at("resid_pre", 0)]
    run_to(model, wanted, ids)  # the proof of an architecture, made once a model, runs all of it
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, key=key: ran.append(key))
        for key, module in model.named_modules()
        if key.endswith((".0", ".1", ".2", "lm_head", "embed_out"))
    ]
    try:
        seen = run_to(model, wanted, ids)
    finally:
        for handle in handles:
            handle.remove()
    assert list(seen) == ["resid_pre.0", "attn_out.1"]
    assert [key[-2:] for key in ran] == [".0", ".1"]
    assert "forward" not in model.__dict__ and torch.equal(logits(model, ids), clean)


def test_capture_is_filled_anew_by_each_forward() -> None:
    model, site = build("gpt2"), at("resid_post", 1)
    with capture(model, [site, Site.parse("blocks.1.hook_resid_post")]) as seen:
        assert model(input_ids=tokens(), use_cache=False) is None
        assert [(key, x.shape) for key, x in seen.items()] == [("resid_post.1", (2, 10, WIDTH))]
        assert model(tokens(3, 4), use_cache=False) is None
        assert seen["resid_post.1"].shape == (3, 4, WIDTH)
    with capture(model, [site], stop=False) as seen:
        embedded = model.get_input_embeddings()(tokens())
        full = model(inputs_embeds=embedded, use_cache=False).logits
    assert torch.equal(full, logits(model, tokens())) and seen["resid_post.1"].shape == (2, 10, WIDTH)


def test_a_replacement_behind_the_stop_is_no_mistake() -> None:
    model = build("gpt2")
    with replace(model, at("resid_post", 2), torch.zeros_like):
        assert torch.equal(
            *(
                run_to(model, [at(kind, layer)], tokens())[f"{kind}.{layer}"]
                for kind, layer in (("resid_post", 0), ("resid_pre", 1))
            )
        )


def test_an_error_inside_a_forward_is_not_swallowed_and_leaves_no_hook() -> None:
    model, site = build("gpt2"), at("resid_post", 1)

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    before = hooks()  # transformers may have left its own

    def fail(x_BTD: Tensor) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), replace(model, site, fail):
        logits(model, tokens())
    with pytest.raises(RuntimeError, match="mine"), capture(model, [site]):
        raise RuntimeError("mine")
    assert "forward" not in model.__dict__
    assert hooks() == before


@pytest.mark.parametrize(
    ("name", "path", "width"),
    [
        ("opt", "model.decoder.layers.1.fc1", 48),  # some versions flatten the tokens here
        ("gpt2", "transformer.h.1.mlp.c_fc", 128),
        ("gpt_neo", "transformer.h.1", WIDTH),  # a tuple
        ("qwen3", "model.layers.1.self_attn.q_norm", WIDTH),  # split into heads
    ],
)
def test_a_module_path_is_the_module_s_output(name: str, path: str, width: int) -> None:
    model, ids, site = build(name, torch.float32), tokens(), Site.parse(path)
    clean, (seen,) = logits(model, ids), run_to(model, [site], ids).values()
    assert seen.shape == (2, 10, width)
    outputs: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: outputs.append(output))
    with replace(model, site, lambda x_BTD: x_BTD):
        assert torch.equal(logits(model, ids), clean)
    handle.remove()
    own = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert torch.equal(own.reshape(2, 10, width), seen)
    with replace(model, site, torch.zeros_like):
        assert not torch.equal(logits(model, ids), clean)


@pytest.mark.parametrize(
    ("name", "path", "width"),
    [
        ("opt", "model.decoder.layers.1.fc2", 48),  # some versions flatten the tokens here
        ("gpt2", "transformer.h.1.mlp.c_proj", 128),
        ("llama", "model.layers.1.self_attn", WIDTH),  # called with its input by name
        ("llama", "model.layers.1", WIDTH),
        ("phi", "model.layers.1.mlp", WIDTH),  # attention reads the same tensor
    ],
)
def test_the_input_of_a_module_path(name: str, path: str, width: int) -> None:
    model, ids, site = build(name, torch.float32), tokens(), Site.parse(f"in.{path}")
    inputs: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handle = model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    clean = logits(model, ids)
    handle.remove()
    (seen,) = run_to(model, [site], ids).values()
    assert seen.shape == (2, 10, width) and torch.equal(seen, inputs[0].reshape(2, 10, width))
    with replace(model, site, lambda x_BTD: x_BTD):
        assert torch.equal(logits(model, ids), clean)
    with replace(model, site, torch.zeros_like):
        assert not torch.equal(logits(model, ids), clean)


def test_what_a_module_reads_is_replaced_for_it_alone() -> None:
    """In a parallel block attention and the MLP read one tensor; the norm before an MLP, the stream that is skipped."""
    model, ids = build("phi"), tokens()
    mlp_in, attn_out = at("mlp_in", 1), at("attn_out", 1)
    clean = run_to(model, [mlp_in, at("attn_in", 1), attn_out], ids)
    assert torch.equal(clean["mlp_in.1"], clean["attn_in.1"])
    with replace(model, mlp_in, torch.zeros_like):
        assert torch.equal(run_to(model, [attn_out, at("mlp_out", 1)], ids)["attn_out.1"], clean["attn_out.1"])
    model = build("llama")
    norm, mid = Site.parse("in.model.layers.1.post_attention_layernorm"), at("resid_mid", 1)
    (clean_mid,) = run_to(model, [mid], ids).values()
    for first, second in ((norm, mid), (mid, norm)):
        with replace(model, first, lambda x_BTD: x_BTD + 1), replace(model, second, lambda x_BTD: x_BTD + 1):
            seen = run_to(model, [norm, mid, at("mlp_out", 1), at("resid_post", 1)], ids)
        assert torch.equal(seen["resid_mid.1"], clean_mid + 1) and torch.equal(seen[str(norm)], (clean_mid + 1) + 1)
        torch.testing.assert_close(seen["resid_post.1"], clean_mid + 1 + seen["mlp_out.1"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "site", "sentence"),
    [
        ("llama", "in.model", "this module is called with input_ids, .* by name, of which none is hidden_states"),
        ("llama", "in.lm_head.x", r"'lm_head\.x' is not in this llama model"),
        ("gpt2", "in.transformer.wte", r"this module reads \[2, 10\], not one vector for each of 2 x 10 tokens"),
        ("gpt2", "resid_post.3", r"resid_post\.3: this gpt2 model has layers 0 to 2"),
        ("phi", "resid_mid.1", r"resid_mid\.1: phi blocks add attention and MLP in parallel and have no resid_mid"),
        ("gpt_neox", "resid_mid.0", "gpt_neox blocks add attention and MLP in parallel"),
        ("cohere", "resid_mid.0", "cohere blocks add attention and MLP in parallel"),
        ("doge", "resid_post.1", r"architecture 'doge' are not known and do not .*, such as model\.layers\.1 for"),
        ("llama", "transformer.h.0", r"'transformer\.h\.0' is not in this llama model: name resid_pre\.<layer>"),
        ("llama", "model", "this module puts out a BaseModelOutputWithPast, not a tensor"),
        ("llama", "model.layers", r"model\.layers: this module is not run in a forward of the model"),
        ("llama", "model.rotary_emb", "not one vector for each of 2 x 10 tokens"),
    ],
)
def test_a_site_that_is_not_there_is_refused(name: str, site: str, sentence: str) -> None:
    model = build(name, torch.float32)
    with pytest.raises(UserError, match=sentence):
        run_to(model, [Site.parse(site)], tokens())


def test_what_would_read_or_change_the_wrong_thing_is_refused() -> None:
    model = build("phi", torch.float32)
    shared = Site.parse("model.layers.1.resid_dropout")
    with pytest.raises(UserError, match="is not run"), replace(model, Site.parse("model.layers"), torch.zeros_like):
        logits(model, tokens())
    with pytest.raises(UserError, match="ran twice in a forward"), replace(model, shared, torch.zeros_like):
        logits(model, tokens())
    try:
        model.train()
        with pytest.raises(UserError, match=r"training mode, call model\.eval\(\) first"):
            run_to(model, [at("resid_post", 0)], tokens())
    finally:
        model.eval()


def test_an_architecture_is_not_taken_because_it_is_silent() -> None:
    """Blocks that add nothing add up under any family; they prove nothing."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**_ROPE)).eval().requires_grad_(False)
    for parameter in model.model.layers[1].mlp.parameters():
        parameter.zero_()
    with pytest.raises(UserError, match="'qwen2' are not known"):
        locate(model, at("resid_post", 0))


def test_a_plain_module_without_a_config_is_named_by_its_class() -> None:
    with pytest.raises(UserError, match="architecture 'Linear'"):
        locate(nn.Linear(2, 2), at("resid_post", 0))


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_names(kind: str) -> None:
    assert Site.parse(f"{kind}.3") == Site.parse(f"blocks.3.hook_{kind}") == Site(kind, 3)
    assert str(Site(kind, 3)) == f"{kind}.3" and Site.parse(f"{kind}.03") == Site(kind, 3)


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_names_of_what_attention_and_the_mlp_read(part: str) -> None:
    site = Site(f"{part}_in", 3)
    assert Site.parse(f"{part}_in.3") == Site.parse(f"blocks.3.{part}.hook_in") == site
    assert str(site) == f"{part}_in.3"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blocks.3.ln2.hook_normalized", r"before the norm's weight and bias are applied, .*: use mlp_in\.3, which is"),
        (
            "blocks.3.ln1.hook_normalized",
            r"before the norm's weight and bias are applied, .*: use attn_in\.3, which is",
        ),
        ("blocks.3.hook_mlp_in", r"stream before the norm: use resid_mid\.3 for that .*, or mlp_in\.3 for what"),
        ("blocks.3.hook_attn_in", r"stream before the norm: use resid_pre\.3 for that .*, or attn_in\.3 for what"),
    ],
)
def test_names_that_only_sound_like_it_are_refused_with_the_right_one(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Site.parse(name)


def test_a_path_keeps_its_name() -> None:
    assert Site.parse("model.layers.3.mlp") == Site("module", path="model.layers.3.mlp")
    assert str(Site.parse("model.layers.3.mlp")) == "model.layers.3.mlp"
    assert Site.parse("in.model.layers.3.mlp") == Site("module_in", path="model.layers.3.mlp")
    assert str(Site.parse("in.model.layers.3.mlp")) == "in.model.layers.3.mlp"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "resid_post",
        "resid_post.-1",
        "resid_post.x",
        "blocks.3.attn.hook_z",
        "blocks.3.hook_q",
        "../up",
        "a/b",
        "a b",
        "3",
        "in",
        "in.",
        "in.in.model",
        "in.mlp_out.3",
        "mlp_in",
        "blocks.3.mlp.hook_pre",
    ],
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"is not known: name one as resid_pre\.<layer>, .* or the path of a module"):
        Site.parse(name)
