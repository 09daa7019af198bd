"""Parts of a causal LM's forward that need not be run again: the layers below a site, and logits that were not read.

Both are proved on the model at hand, bit for bit, before they are relied on; where the proof fails the whole model is
run each time. Letters: B contexts, T tokens of a context, D width of the last layer, V vocabulary, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from data.base.errors import UserError
from data.base.sites import Site
from harvest.hooks import locate


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand for the module's own; its hooks are called as ever."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple | list) else output
    return tensor


def _with_first(output: Any, tensor: Tensor) -> Any:
    return type(output)((tensor, *output[1:])) if isinstance(output, tuple | list) else tensor


class LayersBelow:
    """The blocks that end before a site's tensor is made or replaced: run once a batch, then remembered.

    `remember` notes what the last of them puts out in a forward; in a forward within `skip` none of them computes
    anything and the last gives what was noted. `blocks` is empty where the model has no list of blocks or the site is
    in none of them.
    """

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.model = model
        self.blocks = _blocks_below(model, site)
        self._output: Any = None

    @contextmanager
    def remember(self) -> Iterator[None]:
        """Note the last block's output in the forward that is run inside the context."""

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # A copy, for a block above may add to its input in place.
            self._output = _with_first(output, _first(output).clone())

        with ExitStack() as stack:
            if self.blocks:
                stack.callback(self.blocks[-1].register_forward_hook(note).remove)
            yield

    @contextmanager
    def skip(self) -> Iterator[None]:
        """Leave the blocks out of the forwards inside the context."""
        with ExitStack() as stack:
            for block in self.blocks[:-1]:
                stack.enter_context(forward_as(block, self._pass_on))
            if self.blocks:
                stack.enter_context(forward_as(self.blocks[-1], self._recall))
            yield

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        x_BTD = args[0] if args else kwargs["hidden_states"]
        return _with_first(self._output, x_BTD)

    def _recall(self, *args: Any, **kwargs: Any) -> Any:
        return _with_first(self._output, _first(self._output).clone())


def _blocks_below(model: nn.Module, site: Site) -> Sequence[nn.Module]:
    """Find the blocks from the first on that can be left out once the site's clean forward is known."""
    blocks: list[nn.Module] = []
    try:
        target = locate(model, site).module
        while True:
            block = locate(model, Site("resid_pre", len(blocks))).module
            if any(module is target for module in block.modules()):
                # The output of a block is remembered with the rest; what is inside of one needs the block run.
                return [*blocks, block] if site.kind == "resid_post" and site.path is None else blocks
            blocks.append(block)
    except UserError:  # no list of blocks, or the site is in none of them
        return []


class Unembedding:
    """The way from the last layer to the logits, for as many rows at a time as memory allows.

    `hidden` runs the model and gives what its head would have read, [B, T, D]; `logits` gives the logits of rows of
    that, by the model's own code with its layers left out. `whole` is true where that does not give the model's own
    logits bit for bit: then `hidden` gives the logits themselves, [B, T, V].
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.whole = True
        self._head: nn.Module | None = _call(model, "get_output_embeddings")
        self._decoder: nn.Module | None = _call(model, "get_decoder") or getattr(model, "base_model", None)
        if self._decoder is model:
            self._decoder = None

    @torch.inference_mode()
    def prove(self, ids_BT: Int64[Tensor, "B T"]) -> None:
        """Compare the two ways to the logits on one short context, which decides `whole`."""
        self.whole = True
        if self._head is None or self._decoder is None:
            return
        ids_BT = ids_BT[:1, :8]
        expected_BTV = self.hidden(ids_BT)
        self.whole = False
        try:
            logits_BTV = self.logits(self.hidden(ids_BT))
        except (RuntimeError, TypeError, AttributeError, KeyError, ValueError, IndexError):
            self.whole = True  # a model whose own forward reads more of its layers' output
            return
        self.whole = logits_BTV.shape != expected_BTV.shape or not torch.equal(logits_BTV, expected_BTV)

    def hidden(self, ids_BT: Int64[Tensor, "B T"]) -> Float[Tensor, "B T _"]:
        """Run the model once, without its head but for one token."""
        if self.whole:
            logits_BTV: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
            return logits_BTV
        assert self._head is not None
        seen: list[Tensor] = []

        def read(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0])
            # Contiguous, for a strided [B, 1, D] has torch copy the whole matrix of the head B times.
            return (args[0][:, :1].contiguous(), *args[1:])

        handle = self._head.register_forward_pre_hook(read)
        try:
            self.model(input_ids=ids_BT, use_cache=False)
        finally:
            handle.remove()
        (hidden_BTD,) = seen
        return hidden_BTD

    def logits(self, hidden_BnD: Float[Tensor, "B n _"]) -> Float[Tensor, "B n V"]:
        """Give the logits of rows that `hidden` gave."""
        if self.whole:
            return hidden_BnD
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        assert self._decoder is not None
        ids_Bn = torch.zeros(hidden_BnD.shape[:2], dtype=torch.int64, device=hidden_BnD.device)
        output = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_BnD)
        with forward_as(self._decoder, lambda *args, **kwargs: output):
            logits_BnV: Tensor = self.model(input_ids=ids_Bn, use_cache=False).logits
        return logits_BnV


def _call(model: nn.Module, name: str) -> nn.Module | None:
    """Call a method of the model, where it has one that gives a module."""
    method = getattr(model, name, None)
    try:
        module = method() if callable(method) else None
    except (AttributeError, NotImplementedError):
        return None
    return module if isinstance(module, nn.Module) else None
