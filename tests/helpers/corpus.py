"""A character tokenizer, texts and model folders small enough to be made anew in each test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers import composing

ROOT = Path(__file__).resolve().parents[2]
BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
LETTERS = " abcdefghijklmnopqrstuvwxyz0123456789.,"
CONTEXT = 16
WIDTH, LAYERS = 32, 3
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    "llama": {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "qwen2": {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
}


def tokenizer() -> Any:
    """One token a character; BOS is 0, EOS 1, unknown 2, then `LETTERS`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([BOS, EOS, UNKNOWN, *LETTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN)


def ids(text: str) -> list[int]:
    """What the tokenizer makes of a text of `LETTERS`, worked out here."""
    return [3 + LETTERS.index(letter) for letter in text]


def story(number: int) -> str:
    """40 to 103 letters that no other number has."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return f"story {number} {digest[: 32 + digest.encode()[0] % 32]}"


def write_stories(path: Path, numbers: Sequence[int]) -> Path:
    path.write_text("".join(json.dumps({"text": story(n)}) + "\n" for n in numbers))
    return path


def build(name: str = "gpt2") -> Any:
    """A seeded random model in eval mode, its weights far enough from their initial values to matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    ends = {"vocab_size": 3 + len(LETTERS), "bos_token_id": 0, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name], **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval().requires_grad_(False)


def save_model(folder: Path, name: str = "gpt2", sink: float = 0.0) -> Path:
    """A model of `CONFIGS` with the tokenizer beside it.

    sink: what the first position of a context has in one dimension of a GPT-2's stream, as massive activations have.
    """
    model = build(name)
    if sink:
        model.transformer.wpe.weight[0, 5] = sink
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def config(model: Path, text: Path, cache: Path | str, *overrides: str) -> dict[str, Any]:
    """conf/harvest.yaml with a tiny model and text: contexts of 16, units of two contexts in four chunks of 8 rows."""
    given = (
        *("model.name=model_here", "model.device=cpu", "text=files", "text.paths=[text_here]", "cache=cache_here"),
        *("tokens=200", "heldout_tokens=40", "sites=[resid_post.1]", "lm_batch=2", f"packing.context={CONTEXT}"),
        *("packing.heldout=0.3", "store.chunk_rows=8", "store.chunks_per_unit=4"),
        *overrides,
    )
    return composing.composed("harvest", given, {"model_here": model, "text_here": text, "cache_here": cache})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
