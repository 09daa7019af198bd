"""The lens against the formulas of the norms, in float64 and by hand; neighbours against all cosines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.base.sites import Site
from evaluate.features import weights
from evaluate.features.weights import Lens, ends, find_input_lens, find_lens, neighbours
from tests.helpers.tiny_lm import mlp_transcoder


def heard() -> tuple[list[int], Any]:
    told: list[int] = []
    return told, told.append


def rows(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def test_the_lens_of_a_gpt2_is_its_final_layernorm_without_its_bias(tiny_lm: Any) -> None:
    lens = find_lens(tiny_lm, 16)
    assert lens is not None and lens.norm is tiny_lm.transformer.ln_f and lens.unembedding is tiny_lm.lm_head
    row_RD = rows(5, 16)
    unit = row_RD.double() / row_RD.double().square().mean(1, keepdim=True).sqrt()
    centred = unit - unit.mean(1, keepdim=True)
    spread = (centred.square().mean(1, keepdim=True) + tiny_lm.transformer.ln_f.eps).sqrt()
    logits = (centred / spread * tiny_lm.transformer.ln_f.weight.double()) @ tiny_lm.lm_head.weight.double().t()
    expected = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(lens.logits(row_RD).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lens.logits(row_RD * 7), lens.logits(row_RD), rtol=1e-4, atol=1e-4)


def test_an_rmsnorm_does_not_centre() -> None:
    norm, unembedding = nn.RMSNorm(6, eps=0.0), nn.Linear(6, 9, bias=False)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
    row_RD = rows(4, 6)
    unit = row_RD / row_RD.square().mean(1, keepdim=True).sqrt()
    logits = (unit * norm.weight) @ unembedding.weight.t()
    expected = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(Lens(norm, unembedding).logits(row_RD), expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_final_norm_of_a_llama_is_found() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": 40, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16},
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    lens = find_lens(model, 8)
    assert lens is not None and lens.norm is model.model.norm
    assert find_lens(model, 16) is None


@pytest.mark.parametrize(("site", "norm"), [("mlp_in.1", "ln_2"), ("attn_in.1", "ln_1")])
def test_an_encoder_reads_the_embeddings_behind_the_norm_before_its_module(tiny_lm: Any, site: str, norm: str) -> None:
    lens = find_input_lens(tiny_lm, Site.parse(site), 16)
    assert lens is not None and lens.norm is getattr(tiny_lm.transformer.h[1], norm)
    row_RD, embedding = rows(3, 16), tiny_lm.transformer.wte.weight.double()
    spread = (embedding.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    own = getattr(tiny_lm.transformer.h[1], norm)
    read = (embedding - embedding.mean(1, keepdim=True)) / spread * own.weight.double() + own.bias.double()
    expected = row_RD.double() @ (read - read.mean(0)).t()
    torch.testing.assert_close(lens.logits(row_RD).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_input_logits_are_what_a_transcoder_s_latents_gain_over_the_mean_token(relu_lm: Any) -> None:
    """The residual stream is one token's embedding alone: z by the encoder itself, behind the model's own norm."""
    transcoder = mlp_transcoder(relu_lm, 0)
    lens = find_input_lens(relu_lm, Site.parse("mlp_in.0"), 16)
    assert lens is not None
    with torch.no_grad():
        z_VF = transcoder.pre_activation(relu_lm.transformer.h[0].ln_2(relu_lm.transformer.wte.weight))
    gained_FV = (z_VF - z_VF.mean(0)).t()
    torch.testing.assert_close(lens.logits(transcoder.W_enc_FD.detach()), gained_FV, rtol=1e-4, atol=1e-4)


def test_at_the_residual_stream_the_embeddings_are_read_as_they_are(tiny_lm: Any) -> None:
    lens = find_input_lens(tiny_lm, Site.parse("resid_mid.1"), 16)
    assert lens is not None and lens.norm is None
    row_RD, embedding = rows(2, 16), tiny_lm.transformer.wte.weight
    torch.testing.assert_close(lens.logits(row_RD), row_RD @ (embedding - embedding.mean(0)).t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site", ["mlp_out.1", "in.transformer.h.1.mlp.c_proj", "transformer.h.1.mlp.c_fc"])
def test_no_input_logits_where_the_way_of_the_embeddings_is_not_known(tiny_lm: Any, site: str) -> None:
    assert find_input_lens(tiny_lm, Site.parse(site), 16) is None
    assert find_input_lens(tiny_lm, Site.parse("mlp_in.1"), 32) is None


def test_no_lens_without_an_unembedding() -> None:
    class Headless(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

    assert find_lens(Headless(), 4) is None


@pytest.mark.parametrize("at_once", [1, 20, 1 << 25])
def test_ends_are_the_largest_and_the_smallest_logits(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "ENTRIES_AT_ONCE", at_once)
    lens = Lens(nn.LayerNorm(6), nn.Linear(6, 9, bias=False))
    row_FD = rows(7, 6)
    told, bar = heard()
    raised, lowered = ends(lens, row_FD, 8, 3, bar)  # the ninth row of the unembedding is no token
    assert sum(told) == 7
    for latent in range(7):
        logits = lens.logits(row_FD[latent : latent + 1])[0][:8].tolist()
        order = sorted(range(8), key=lambda token: -logits[token])
        assert raised[0][latent].tolist() == order[:3] and lowered[0][latent].tolist() == order[::-1][:3]
        assert raised[1][latent].tolist() == pytest.approx([logits[token] for token in order[:3]], abs=1e-5)


@pytest.mark.parametrize("at_once", [1, 20, 1 << 25])
def test_neighbours_are_by_cosine_and_never_oneself(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "ENTRIES_AT_ONCE", at_once)
    row_FD = rows(9, 4) * torch.linspace(0.1, 5, 9)[:, None]
    row_FD[7] = row_FD[2] * 3 + torch.tensor([0.01, 0, 0, 0])  # nearly the same direction
    told, bar = heard()
    latents, cosines = neighbours(row_FD, 4, bar)
    assert sum(told) == 9
    every = nn.functional.cosine_similarity(row_FD[:, None], row_FD[None], dim=-1)
    for latent in range(9):
        order = sorted((other for other in range(9) if other != latent), key=lambda o: -float(every[latent, o]))
        assert latents[latent].tolist() == order[:4]
        assert cosines[latent].tolist() == pytest.approx([float(every[latent, o]) for o in order[:4]], abs=1e-6)
    assert latents[2, 0] == 7 and latents[7, 0] == 2
    alone, _ = neighbours(row_FD[:1], 4, bar)
    assert alone.shape == (1, 0)
