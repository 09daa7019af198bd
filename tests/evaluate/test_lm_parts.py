"""What is left out of a forward changes no bit of what is left in, and memory does not grow with the vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data.base.sites import Site
from evaluate import splice as splicing
from evaluate.lm_parts import LayersBelow, Unembedding
from evaluate.score import SiteScore
from evaluate.splice import Splice
from harvest.hooks import replace
from tests.helpers.slow import slow_unless
from train.sae.variants.relu import ReLU

IDS = torch.randint(1, 40, (4, 12), generator=torch.Generator().manual_seed(2))
KEEP = torch.rand(4, 12, generator=torch.Generator().manual_seed(3)) > 0.2
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32},
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
    "gemma2": {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8},
    },
    "opt": {
        **{"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
        **{"word_embed_proj_dim": 16, "max_position_embeddings": 32},
    },
}
SITES = ("resid_pre.0", "resid_mid.2", "resid_post.0", "resid_post.3", "attn_out.1", "mlp_out.2")


def a_model(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=40, **FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


@contextmanager
def counted(module: nn.Module, name: str = "forward") -> Iterator[list[Tensor]]:
    """Notes the first argument of every computation that the module really makes (what its first child reads)."""
    seen: list[Tensor] = []
    child = next(iter(module.children()), module)
    handle = child.register_forward_pre_hook(lambda _, args: seen.append(args[0] if args else torch.zeros(0)))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("family", slow_unless({"gpt2", "gemma2"}.__contains__, FAMILIES))
@pytest.mark.parametrize("site", SITES)
def test_losses_are_those_of_whole_forwards_to_the_bit(family: str, site: str) -> None:
    if family == "gpt_neox" and site.startswith("resid_mid"):
        pytest.skip("blocks in parallel have no such point")
    model, at = a_model(family), Site.parse(site)
    splice = Splice(model, at)
    clean = splice.clean(IDS, KEEP)
    rows = clean.x_ND.roll(1, 0)
    ce, kl = splice.spliced(clean, rows)

    def put(x_BTD: Tensor) -> Tensor:
        changed = x_BTD.clone()
        changed[KEEP] = rows
        return changed

    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
        with replace(model, at, put):
            after = model(input_ids=IDS, use_cache=False).logits
    scored = KEEP[:, 1:]
    p, q = (logits[:, :-1][scored].float().log_softmax(-1) for logits in (before, after))
    assert torch.equal(ce, -q.gather(1, IDS[:, 1:][scored][:, None])[:, 0])
    assert torch.equal(kl, (p.exp() * (p - q)).sum(1)) and float(kl.mean()) > 1e-4
    assert torch.equal(splice.ablated(clean, rows), ce)
    assert not splice.head.whole


@pytest.mark.parametrize(("site", "computed"), [("resid_post.2", 1), ("mlp_out.2", 2), ("resid_pre.0", 4)])
def test_layers_below_the_site_are_run_once_a_batch(site: str, computed: int) -> None:
    model = a_model("llama")
    splice = Splice(model, Site.parse(site))
    clean = splice.clean(IDS, KEEP)
    counts = []
    for layer in model.model.layers:
        with counted(layer) as seen:
            splice.spliced(clean, clean.x_ND)
        counts.append(len(seen))
    assert counts == [0] * (4 - computed) + [1] * computed


def test_a_model_whose_layers_speak_to_each_other_is_run_whole() -> None:
    """A block that reads what the first block noted cannot do without it, and the proof finds that."""
    model = a_model("gpt2")
    notes: list[Tensor] = []
    blocks = model.transformer.h
    blocks[0].mlp.register_forward_hook(lambda module, args, out: notes.append(out))
    blocks[3].mlp.register_forward_hook(lambda module, args, out: out + notes.pop())
    splice = Splice(model, Site.parse("resid_post.2"))
    clean = splice.clean(IDS, KEEP)
    assert splice.below.blocks == []
    with counted(blocks[0]) as seen:
        ce, _ = splice.spliced(clean, clean.x_ND)
    assert len(seen) == 1 and torch.equal(ce, clean.ce_P)


def test_sites_outside_of_blocks_leave_nothing_out() -> None:
    model = a_model("gpt2")
    assert LayersBelow(model, Site.parse("transformer.ln_f")).blocks == []
    inside = LayersBelow(model, Site.parse("transformer.h.2.mlp.c_fc"))
    assert list(inside.blocks) == list(model.transformer.h[:2])


def score_of(model: Any, sae: ReLU) -> dict[str, Any]:
    score = SiteScore(Splice(model, Site.parse("resid_post.1")), [sae], torch.zeros(16), torch.float32, (4, 12))
    score.batch(IDS, KEEP, 0)
    return score.columns(score.scores[0])


def test_logits_in_parts_give_the_same_losses(
    rough_sae: Callable[[int], ReLU], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model("gemma2")  # which caps its logits after the head
    whole = score_of(model, rough_sae(16))
    monkeypatch.setattr(splicing, "LOGITS_WHOLE", 0)
    monkeypatch.setattr(splicing, "LOGITS_IN_PARTS", 40 * 5)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[0] * out.shape[1]))
    parts = score_of(model, rough_sae(16))
    assert max(rows) <= max(5, 8)  # five rows a part; the proof on the first batch takes eight tokens
    for name, column in whole.items():
        np.testing.assert_allclose(parts[name], column, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_model_that_changes_its_logits_by_its_input_is_read_whole() -> None:
    """Its logits cannot be had from the hidden states alone, and the proof finds that."""
    model = copy.deepcopy(a_model("llama"))
    inner = model.forward

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        output = inner(input_ids=input_ids, **kwargs)
        output.logits = output.logits * (1 + input_ids.float().mean())
        return output

    model.forward = forward
    head = Unembedding(model)
    head.prove(IDS)
    assert head.whole
    splice = Splice(model, Site.parse("resid_post.1"))
    clean = splice.clean(IDS, KEEP)
    ce, kl = splice.spliced(clean, clean.x_ND)
    assert torch.equal(ce, clean.ce_P) and not kl.any()
