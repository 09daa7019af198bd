"""python -m pytest tests/harvest/test_gguf.py: a model as one GGUF file is the model it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.base.errors import UserError
from data.base.sites import Site
from data.store.manifest import TRAIN
from data.store.store import Store
from harvest import lm
from harvest.hooks import run_to
from harvest.lm import LanguageModel
from harvest.run import harvest
from tests.helpers.corpus import LETTERS, build, config, write_stories

gguf = pytest.importorskip("gguf")

LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection in GGUF's order: the halves of each head's rotation take turns."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def as_halves(weight: Any, heads: int) -> Any:
    """The inverse of `interleaved`."""
    turns = weight.reshape(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
    return turns.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, architecture: str = "llama", quantisation: str = "F32") -> tuple[Path, Any]:
    """A small model of the tests with a byte-level tokenizer of one merge, and the model of the weights in the file.

    quantisation: of every matrix whose rows are whole blocks of it, as llama.cpp does; the rest is float32.
    """
    model = build(architecture)
    sizes = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(sizes.hidden_size // sizes.num_attention_heads)
    writer.add_vocab_size(sizes.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<s>", "</s>", "<unk>", *LETTERS.replace(" ", "Ġ")[:-1], "th"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * len(LETTERS))  # control, then normal
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, value in model.state_dict().items():
        weight = value.float().numpy()
        target = gguf_name(name)
        # llama.cpp turns the rotated heads of a Llama around, those of no other model here.
        turned = architecture == "llama" and target.endswith(("attn_q.weight", "attn_k.weight"))
        if turned:
            weight = interleaved(weight, sizes.num_attention_heads)
        if weight.ndim == 1 or weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(target, np.ascontiguousarray(weight))
            continue
        blocks = gguf.quantize(np.ascontiguousarray(weight), kind)
        writer.add_tensor(target, blocks, raw_dtype=kind)
        unpacked = gguf.dequantize(blocks, kind)
        if turned:
            unpacked = as_halves(unpacked, sizes.num_attention_heads)
        value.copy_(torch.from_numpy(unpacked))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def gguf_name(name: str) -> str:
    """The name in GGUF of a tensor of transformers."""
    base, _, kind = name.rpartition(".")
    if base in OTHER_TENSORS:
        return f"{OTHER_TENSORS[base]}.{kind}"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{LAYER_TENSORS[part]}.{kind}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")[0]


def test_config_tokenizer_and_weights_come_from_the_file(model: Path) -> None:
    ours = LanguageModel.of({"name": str(model), "device": "cpu"})
    ours.check()
    assert (ours.short_name, ours.context_limit, ours.layer_count) == ("tiny", 64, 3)
    assert ours.compute_dtype == LanguageModel.of({"name": str(model), "dtype": "auto"}).compute_dtype == "float32"
    tokenizer = lm.load_tokenizer(ours)
    assert tokenizer("a th b", add_special_tokens=False)["input_ids"] == [4, 3, 3 + len(LETTERS) - 1, 3, 5]
    ids_BT = torch.arange(3, 40)[None]
    assert torch.equal(ours.load()(input_ids=ids_BT).logits, build("llama")(input_ids=ids_BT).logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("quantisation", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q4_0"])
def test_quantised_blocks_are_the_model_of_the_weights_they_stand_for(
    architecture: str, quantisation: str, tmp_path: Path
) -> None:
    path, unpacked = write_gguf(tmp_path / "small.gguf", architecture, quantisation)
    ids_BT = torch.arange(3, 40)[None]
    expected = unpacked(input_ids=ids_BT).logits
    assert torch.equal(LanguageModel.of({"name": str(path), "device": "cpu"}).load()(input_ids=ids_BT).logits, expected)
    # The blocks are not the weights that went in.
    assert not torch.equal(expected, build(architecture)(input_ids=ids_BT).logits)


def test_sites_of_another_architecture_are_harvested_from_its_file(tmp_path: Path) -> None:
    path, unpacked = write_gguf(tmp_path / "small.gguf", "qwen2", "Q8_0")
    text = write_stories(tmp_path / "stories.jsonl", range(40))
    store = harvest(config(path, text, tmp_path / "cache", "sites=[resid_post.1,mlp_out.2]"))
    assert store.rows(TRAIN, "mlp_out.2") >= 200
    site = Site.parse("resid_post.1")
    ids_BT = torch.arange(3, 40)[None]
    stream_BTD = unpacked.model(input_ids=ids_BT, output_hidden_states=True).hidden_states[2]
    assert torch.equal(
        run_to(lm.load_model({"name": str(path), "device": "cpu"}), [site], ids_BT)[str(site)], stream_BTD
    )


def test_identity_is_the_content_whatever_the_file_is_called(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.gguf"
    copy.write_bytes(model.read_bytes())
    text = write_stories(tmp_path / "stories.jsonl", range(40))
    first = harvest(config(model, text, tmp_path / "cache"))
    assert first.rows(TRAIN, "resid_post.1") >= 200
    assert harvest(config(copy, text, tmp_path / "cache")).path == first.path
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(bytes(data))
    other = LanguageModel.of({"name": str(copy)}).identity()["files"]
    assert other != Store.open(first.path).manifest.identity["model"]["files"]


def test_what_is_no_whole_gguf_file_is_one_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, part = tmp_path / "damaged.gguf", tmp_path / "big-00001-of-00002.gguf"
    damaged.write_bytes(b"<html>")
    part.write_bytes(model.read_bytes())
    with pytest.raises(UserError, match=r"damaged\.gguf is damaged or no GGUF file"):
        lm.check_model({"name": str(damaged)})
    with pytest.raises(UserError, match=r"is one part of a model: join the parts"):
        lm.check_model({"name": str(part)})
    with pytest.raises(UserError, match=r"has no config\.json but GGUF files: name one, as .*tiny\.gguf"):
        lm.check_model({"name": str(model.parent)})
    with pytest.raises(UserError, match=r"none\.gguf' does not exist"):
        lm.check_model({"name": str(tmp_path / "none.gguf")})
    damaged.write_bytes(model.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"model '.*damaged\.gguf' cannot be loaded"):
        lm.load_model({"name": str(damaged), "device": "cpu"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the extra `gguf`, .*pip install gguf accelerate"):
        lm.check_model({"name": str(model)})
