"""A tiny language model, its store made by a real harvest, and SAEs whose splice is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.sae.variants.relu import ReLU

WIDTH, LAYERS, SITE = 16, 2, "resid_post.0"


def made_of(d_in: int, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> ReLU:
    sae = ReLU(d_in, W_enc.shape[1], sparsity=0.0, input_norm="none")
    with torch.no_grad():
        sae.W_enc.copy_(W_enc)
        sae.W_dec.copy_(W_dec)
        sae.b_dec.copy_(b_dec)
    return sae


@pytest.fixture(scope="session")
def identity_sae() -> Callable[[int], ReLU]:
    """x = relu(x) - relu(-x), exact in floating point."""

    def make(d_in: int) -> ReLU:
        eye = torch.eye(d_in)
        return made_of(d_in, torch.cat([eye, -eye], 1), torch.cat([eye, -eye], 0), torch.zeros(d_in))

    return make


@pytest.fixture(scope="session")
def constant_sae() -> Callable[[Tensor], ReLU]:
    """Gives `b_dec` whatever it reads, while its latents fire."""

    def make(b_dec: Tensor) -> ReLU:
        d_in = len(b_dec)
        return made_of(d_in, torch.eye(d_in), torch.zeros(d_in, d_in), b_dec)

    return make


@pytest.fixture(scope="session")
def rough_sae() -> Callable[[int], ReLU]:
    """A reconstruction with an error, from seeded random directions."""

    def make(d_in: int) -> ReLU:
        g = torch.Generator().manual_seed(5)
        W = torch.randn(d_in, 3 * d_in, generator=g) / d_in**0.5
        return made_of(d_in, W, W.t() * 0.4, torch.randn(d_in, generator=g) * 0.1)

    return make


def tiny_gpt2(**settings: Any) -> Any:
    """A GPT-2 of two layers with random weights, large enough that a splice shows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=WIDTH, n_layer=LAYERS, n_head=2, **settings)
    config.bos_token_id = config.eos_token_id = 0
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_lm() -> Iterator[Any]:
    """A GPT-2 of two layers."""
    yield tiny_gpt2()


@pytest.fixture(scope="session")
def relu_lm() -> Iterator[Any]:
    """The same with MLPs of relu, each of which a ReLU transcoder can be."""
    yield tiny_gpt2(activation_function="relu")


def mlp_transcoder(model: Any, layer: int) -> ReLU:
    """The transcoder that is the MLP of a layer of `relu_lm`: y = relu(x W_1 + b_1) W_2 + b_2."""
    mlp = model.transformer.h[layer].mlp
    sae = ReLU(WIDTH, 4 * WIDTH, WIDTH, sparsity=0.0, input_norm="none")
    with torch.no_grad():
        sae.W_enc.copy_(mlp.c_fc.weight)
        sae.b_enc.copy_(mlp.c_fc.bias)
        sae.W_dec.copy_(mlp.c_proj.weight)
        sae.b_dec.copy_(mlp.c_proj.bias)
    sae.site, sae.target = f"mlp_in.{layer}", f"mlp_out.{layer}"
    return sae


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(vocab_size=96, special_tokens=["[bos]", "[unk]"]))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="[bos]", eos_token="[bos]", unk_token="[unk]"
    ).save_pretrained(folder)


def harvest_of(model: Any, root: Path, sites: Sequence[str] = (SITE, "mlp_out.1"), **packing: Any) -> dict[str, Any]:
    """The configuration of a harvest of the model that has run in `root`, and its store."""
    from harvest.run import harvest

    g = torch.Generator().manual_seed(1)
    words = [f"w{i}" for i in range(80)]
    texts = [" ".join(words[i] for i in torch.randint(80, (60,), generator=g)) for _ in range(60)]
    (root / "text").mkdir()
    for number, text in enumerate(texts):
        (root / "text" / f"{number}.txt").write_text(text)
    model.save_pretrained(root / "lm")
    write_tokenizer(root / "lm", texts)
    config = {
        "model": {
            "name": str(root / "lm"),
            "revision": None,
            "dtype": "float32",
            "device": "cpu",
            "device_map": None,
            "attn_implementation": None,
        },
        "text": {"kind": "files", "paths": [str(root / "text" / "*.txt")], "field": "text"},
        "packing": {
            "context": 16,
            "bos": "context",
            "separator": False,
            "keep_special": False,
            "shuffle": 0,
            "heldout": 0.3,
            **packing,
        },
        "sites": [*sites],
        "tokens": 1200,
        "heldout_tokens": 300,
        "lm_batch": 4,
        "cache": str(root / "cache"),
        "store": {"dtype": "bfloat16"}
        | dict.fromkeys(("chunk_rows", "chunks_per_unit", "mixing_seed", "encoding", "codec", "shards"), None),
        "allow_mixed_devices": False,
    }
    return {"config": config, "store": harvest(config), "root": root}


@pytest.fixture(scope="session")
def harvested(tmp_path_factory: pytest.TempPathFactory, tiny_lm: Any) -> dict[str, Any]:
    """The configuration of a harvest that has run, and its store: {"config", "store", "root"}."""
    return harvest_of(tiny_lm, tmp_path_factory.mktemp("harvested"))
