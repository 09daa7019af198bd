"""python -m pytest tests/harvest/test_lm.py: what a model's name means, what is refused, what is loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data.base.errors import UserError
from harvest import lm
from harvest.lm import LanguageModel

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared" / "lm" / "stories260K"


# Loading


def test_a_saved_model_comes_back_for_reading(saved: Path) -> None:
    from transformers import GPT2LMHeadModel

    cfg = {"name": str(saved), "device": "cpu"}
    lm.check_model(cfg)
    model, own = lm.load_model(cfg), GPT2LMHeadModel.from_pretrained(saved)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.config.use_cache is False and model.dtype == torch.float32 and model.device.type == "cpu"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own.parameters(), strict=True))
    tokenizer = lm.load_tokenizer(cfg)
    assert tokenizer("one two six once")["input_ids"] == [3, 4, 8, 2] and tokenizer.bos_token_id == 0
    assert LanguageModel.of(cfg).context_limit == 24 and LanguageModel.of(cfg).short_name == "tiny.gpt-2"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_as_set_and_as_the_config_says(folder: Path, dtype: str) -> None:
    assert lm.load_model({"name": str(folder), "dtype": dtype, "device": "cpu"}).dtype == getattr(torch, dtype)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config))
    auto = {"name": str(folder), "dtype": "auto", "device": "cpu"}
    assert LanguageModel.of(auto).compute_dtype == dtype and lm.load_model(auto).dtype == getattr(torch, dtype)
    assert LanguageModel.of({"name": str(folder)}).compute_dtype == "float32"
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float64"}))
    with pytest.raises(UserError, match=r"dtype=auto: the config of .* says float64, set one of float32"):
        _ = LanguageModel.of(auto).compute_dtype


def test_the_attention_implementation_is_passed_on(saved: Path) -> None:
    cfg = {"name": str(saved), "device": "cpu", "attn_implementation": "eager"}
    assert lm.load_model(cfg).config._attn_implementation == "eager"
    assert lm.identify(cfg) != lm.identify({"name": str(saved)})
    with pytest.raises(UserError, match=r"cannot be loaded: ValueError: .*nonsense"):
        lm.load_model(cfg | {"attn_implementation": "nonsense"})


def test_stories260k_reads_as_its_card_says() -> None:
    if not STORIES.is_dir():
        pytest.skip("the trained model stories260K is not beside this checkout")
    cfg = {"name": str(STORIES), "device": "cpu"}
    lm.check_model(cfg)
    model, tokenizer = lm.load_model(cfg), lm.load_tokenizer(cfg)
    ids = torch.tensor([tokenizer("Once upon a time, there was a little girl")["input_ids"]])
    assert ids[0, 0] == tokenizer.bos_token_id and LanguageModel.of(cfg).context_limit == 512
    assert sum(p.numel() for p in model.parameters()) == 260_032
    assert model(input_ids=ids, labels=ids).loss < 1.5  # guessing evenly: ln 512 = 6.2


def test_the_embedded_model_is_the_folder_in_the_checkout() -> None:
    embedded = LanguageModel.of({"name": "embedded"})
    assert embedded.path == ROOT / "harvest" / "embedded" and embedded.short_name == "embedded"


def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lm.check_model({"name": str(folder)})
    with pytest.raises(UserError, match=r"lack 1 tensors, such as 'transformer\.h\.1\.mlp\.c_fc\.weight'"):
        lm.load_model({"name": str(folder), "device": "cpu"})


def test_shards_are_all_wanted_and_all_named(saved: Path, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    folder = Path(shutil.copytree(saved, tmp_path / "shards", ignore=shutil.ignore_patterns("*.safetensors")))
    GPT2LMHeadModel.from_pretrained(saved).save_pretrained(folder, max_shard_size="8KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert set(lm.identify({"name": str(folder)})["files"]) == {
        "config.json",
        "model.safetensors.index.json",
        *(shard.name for shard in shards),
    }
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name} is missing"):
        lm.check_model({"name": str(folder)})


# Identity


def test_identity_is_the_content(saved: Path, folder: Path) -> None:
    first = lm.identify({"name": str(saved)})
    assert first["name"] == "tiny.gpt-2" and first["commit"] is None
    assert first["files"] == {
        name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    assert lm.identify({"name": str(folder)})["files"] == first["files"]
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert lm.identify({"name": str(folder)})["files"]["model.safetensors"] != first["files"]["model.safetensors"]


def test_the_tokenizer_s_hash_is_its_rules_and_not_its_last_call(saved: Path, folder: Path) -> None:
    tokenizer, again = lm.load_tokenizer({"name": str(saved)}), lm.load_tokenizer({"name": str(folder)})
    first = lm.tokenizer_hash(tokenizer)
    again(["one", "two three"], truncation=True, max_length=1)
    assert len(first) == 64 and lm.tokenizer_hash(again) == first
    again.add_special_tokens({"bos_token": "one"})
    assert lm.tokenizer_hash(again) != first
    tokenizer.add_tokens(["seven"])
    assert lm.tokenizer_hash(tokenizer) != first


@pytest.mark.parametrize(
    ("name", "short"),
    [("openai-community/gpt2", "gpt2"), ("gpt2", "gpt2"), ("google/gemma-3-1b-pt", "gemma-3-1b-pt")],
)
def test_short_names(name: str, short: str) -> None:
    assert LanguageModel.of({"name": name}).short_name == short


def test_short_name_of_an_odd_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my model (2)").mkdir()
    monkeypatch.chdir(tmp_path / "my model (2)")
    assert (
        LanguageModel.of({"name": "."}).short_name
        == LanguageModel.of({"name": "../my model (2)/"}).short_name
        == "my-model-2"
    )


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"n_positions": 24}, 24),
        ({"max_position_embeddings": 77, "n_positions": None}, 77),
        ({"text_config": {"max_position_embeddings": 99}, "max_position_embeddings": 7}, 99),
        ({"n_positions": None}, 1024),  # GPT-2's default, from transformers' own config class
    ],
)
def test_context_limit(folder: Path, config: dict[str, Any], limit: int) -> None:
    old = json.loads((folder / "config.json").read_text())
    new = {key: value for key, value in (old | config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(new))
    assert LanguageModel.of({"name": str(folder)}).context_limit == limit


# Refusals


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, r"model\.name is not set"),
        ({"name": None}, r"model\.name is not set"),
        ({"name": 7}, r"model\.name=7 is not allowed: it should be a valid string"),
        ({"name": "gpt2", "quantise": True}, r"model\.quantise is no setting: leave it out"),
        (
            {"name": "gpt2", "dtype": "int8"},
            r"model\.dtype=int8 is not allowed: it should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        ({"name": "embedded", "revision": "main"}, r"model\.revision holds for models of the hub only"),
        ({"name": "gpt2", "device": "cpu", "device_map": "auto"}, "are both set"),
        ({"name": "embedded", "device": "cuda:99"}, r"model\.device=cuda:99 is not on this machine"),
        ({"name": "embedded", "device": "mps:x"}, r"model\.device=mps:x is not on this machine"),
        ({"name": "./nowhere"}, r"model folder '\./nowhere' does not exist"),
        ({"name": "/no/such/folder"}, "does not exist: name a folder or a model of the hub"),
        ({"name": __file__}, "is a file: name the folder"),
    ],
)
def test_a_setting_that_cannot_hold_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        lm.check_model(settings)


def test_a_device_that_torch_has_not_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"device=tpu is not on this machine: set model\.device=cpu or auto"):
        lm.load_model({"name": str(saved), "device": "tpu"})


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    content = weights.read_bytes()
    if how == "cut":
        weights.write_bytes(content[:-1])
    elif how == "cut in the header":
        weights.write_bytes(content[:100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "longer":
        weights.write_bytes(content + b"0")
    elif how == "a page of the web":
        weights.write_bytes(b"<!DOCTYPE html><html>" + b" " * 500)
    elif how == "cut zip":
        weights.unlink()
        torch.save({"a": torch.zeros(100)}, folder / "pytorch_model.bin")
        (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-10])
    elif how == "config gone":
        config.unlink()
    elif how == "config cut":
        config.write_text(config.read_text()[:40])
    elif how == "weights gone":
        weights.unlink()
    else:
        config.write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("cut", r"model\.safetensors has \d+ bytes of \d+: copy or download it again"),
        ("longer", r"model\.safetensors has \d+ bytes of \d+"),
        ("cut in the header", r"model\.safetensors is truncated or damaged"),
        ("empty", r"model\.safetensors is truncated or damaged"),
        ("a page of the web", r"model\.safetensors is truncated or damaged"),
        ("cut zip", r"pytorch_model\.bin is truncated or damaged"),
        ("config gone", r"has no config\.json"),
        ("config cut", r"config\.json is damaged"),
        ("weights gone", r"has no weights \(model\.safetensors\)"),
        ("other kind", "holds an encoder-decoder model"),
    ],
)
def test_a_damaged_folder_is_refused_from_its_files_alone(folder: Path, how: str, sentence: str) -> None:
    damage(folder, how)
    for refuse in (lm.check_model, lm.load_model, lm.identify):
        with pytest.raises(UserError, match=sentence):
            refuse({"name": str(folder)})


def test_an_architecture_or_tokenizer_transformers_does_not_know_is_one_sentence(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"the tokenizer of model .* cannot be loaded"):
        lm.load_tokenizer({"name": str(folder)})
    (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(UserError, match=r"cannot be loaded: ValueError: .*nonesuch"):
        lm.load_model({"name": str(folder), "device": "cpu"})


@pytest.mark.parametrize(
    ("device", "rank", "found"),
    [
        ("auto", "1", "cuda:1"),
        ("cuda", "2", "cuda:0"),
        ("cuda:1", "0", "cuda:1"),
        ("cpu", "1", "cpu"),
        ("auto", None, "cuda"),
    ],
)
def test_under_torchrun_each_process_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, rank: str | None, found: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert lm.torch_device(device) == found
