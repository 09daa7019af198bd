"""A saved model that the tests of its folder and of the hub share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.helpers.corpus import ROOT

WORDS = ["<s>", "</s>", "<unk>", "one", "two", "three", "four", "five", "six"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with a tokenizer, as save_pretrained writes it; not to be changed."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny.gpt-2"
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    rules = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=rules, **ends).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="session")
def smollm2() -> str:
    """SmolLM2-135M-Instruct as `make demo-real` leaves it, or as the variable SMOLLM2 names it; skips without it."""
    at_home = ROOT / str(OmegaConf.load(ROOT / "conf" / "model" / "smollm2.yaml").name)
    path = os.environ.get("SMOLLM2", str(at_home))
    if not Path(path).exists():
        pytest.skip("SmolLM2 is not here: `make demo-real` fetches it, or name its folder or file in SMOLLM2")
    return path
