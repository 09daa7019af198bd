"""Contexts that are given, where SAELens' evaluations look for a store of activations that tokenises the hub's text."""

from __future__ import annotations

from torch import Tensor


class Contexts:
    """Hands out contexts of tokens [n, T] in order, under the names that SAELens' `ActivationsStore` has for it."""

    def __init__(self, ids_BT: Tensor, batch: int) -> None:
        self.ids_BT, self.store_batch_size_prompts, self.context_size, self.at = ids_BT, batch, ids_BT.shape[1], 0

    def get_batch_tokens(self, size: int) -> Tensor:
        """Return the next contexts."""
        self.at += size
        return self.ids_BT[self.at - size : self.at]

    def reset_input_dataset(self) -> None:
        """Begin again with the first."""
        self.at = 0
