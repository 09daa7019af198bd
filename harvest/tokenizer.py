"""What a tokenizer is to a store: the hash of its rules; and what takes its place where text comes as token ids."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from data.base.errors import UserError
from data.base.records import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenIds:
    """Stands where a model has no tokenizer: documents come as token ids, and special tokens by the model's config."""

    unk_token_id = None

    def __init__(self, model: str, config: Json) -> None:
        self.model = model
        self.bos_token_id, self.eos_token_id = (_first_id(config.get(f"{end}_token_id")) for end in ("bos", "eos"))
        self.all_special_ids = sorted({one for one in (self.bos_token_id, self.eos_token_id) if one is not None})

    def __call__(self, texts: list[str], **_: Any) -> Any:
        raise UserError(
            f"model {self.model} has no tokenizer (tokenizer.json): copy it there, or give the text as token ids, "
            "as in text.field=input_ids"
        )

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: Any, **_: Any) -> str:
        """Write the ids themselves, as there are no words for them."""
        return " ".join(str(int(one)) for one in ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(one) for one in ids]


def _first_id(value: Any) -> int | None:
    """Return a token id of a config, which may be a list of them."""
    one = value[0] if isinstance(value, list) and value else value
    return one if isinstance(one, int) and not isinstance(one, bool) else None


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | TokenIds) -> str:
    """Return sha256 of what decides its tokens: the whole pipeline where it has one,
    else the vocabulary; special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Json = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # state of the last call, not of the tokenizer
            rules.pop(passing, None)
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "all": sorted(tokenizer.all_special_ids)}
    text = json.dumps({"rules": rules, "special": special}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
