"""Whether two stores hold the same tokens in the same places, so that row i of one belongs to row i of the other."""

from __future__ import annotations

import numpy as np

from data.base.errors import UserError
from data.loading.reader import open_reader
from data.store.store import TOKENS, Store


def require_same_tokens(first: Store, other: Store, split: str) -> None:
    """Compare the token arrays of both stores, as far as both go; UserError unless layout and tokens are equal."""
    if first.layout != other.layout:
        raise UserError(
            f"{first.path} and {other.path} lay their rows out differently, so row i of one is another token in the "
            "other: harvest both with the same settings of packing and store"
        )
    readers = [open_reader(store, split, TOKENS) for store in (first, other)]
    for chunk in range(min(len(reader.sizes) for reader in readers)):
        tokens = []
        for reader in readers:
            tokens.append(np.empty(int(reader.sizes[chunk]), reader.dtype))
            reader.read(chunk, tokens[-1])
        if readers[0].numbers[chunk] != readers[1].numbers[chunk] or not np.array_equal(tokens[0], tokens[1]):
            raise UserError(
                f"{first.path} and {other.path} hold different tokens in chunk {readers[0].numbers[chunk]} of {split}: "
                "sites of several stores need the same text, tokenizer and packing"
            )
