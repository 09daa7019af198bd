"""What can be read off an SAE's weights: the logits a decoder row raises and lowers, and the rows near it.

Letters: F latents, G latents of another SAE, R rows at a time, D width of the site, V vocabulary, K entries kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from harvest.lm import input_device

ENTRIES_AT_ONCE = 1 << 25  # of a [R, V] or [R, F] product: 128 MB in float32


class Lens:
    """A decoder row alone, put through the LM's final norm and unembedding.

    logits(row) = [N(r) - N(-r)] / 2 @ W_U^T, less its mean over V, with r = row * sqrt(D) / ||row||. The difference
    takes the norm's bias away; of a LayerNorm there stays gamma * (r - mean r) / sd r, of an RMSNorm gamma * r / rms r.
    What later layers make of the row is not in it (the direct path only), nor is the size of the rest of the residual.
    """

    def __init__(self, norm: nn.Module, unembedding: nn.Module) -> None:
        self.norm, self.unembedding = norm, unembedding

    @torch.inference_mode()
    def logits(self, rows_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        weight = self.unembedding.weight
        assert isinstance(weight, Tensor)
        # A residual's length, which the norm divides by: at length 1 the norm's epsilon would count.
        unit_RD = nn.functional.normalize(rows_RD.float().to(weight.device)) * rows_RD.shape[1] ** 0.5
        unit_RD = unit_RD.to(weight.dtype)
        through_RD = (self.norm(unit_RD) - self.norm(-unit_RD)) / 2
        logits_RV = (through_RD.to(weight.dtype) @ weight.t()).float()
        centred_RV: Tensor = logits_RV - logits_RV.mean(1, keepdim=True)
        return centred_RV


@torch.inference_mode()
def find_lens(model: Any, d_in: int) -> Lens | None:
    """Find the lens of a causal LM, its norm found as the module whose output the unembedding reads in a short
    forward.

    None where the model has none that takes vectors of `d_in` entries.
    """
    unembedding = model.get_output_embeddings()
    if unembedding is None:
        return None
    read: list[Tensor] = []
    outputs: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.is_floating_point():
            outputs.append((module, args[0], output))

    with ExitStack() as stack:
        for module in model.modules():
            if module is unembedding:
                stack.callback(module.register_forward_pre_hook(lambda _, args: read.append(args[0])).remove)
            elif not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(note).remove)
        model(input_ids=torch.arange(4, device=input_device(model))[None], use_cache=False)
    # The last module to put out what the unembedding reads; an inner one may have done so earlier.
    for module, given, made in reversed(outputs):
        if read and made.numel() == read[-1].numel() and torch.equal(made.reshape(read[-1].shape), read[-1]):
            return Lens(module, unembedding) if given.shape[-1] == d_in == made.shape[-1] else None
    return None


Ends = tuple[Int64[Tensor, "F K"], Float[Tensor, "F K"]]


def ends(
    lens: Lens, W_dec_FD: Float[Tensor, "F D"], vocabulary: int, count: int, bar: Callable[[int], Any]
) -> list[Ends]:
    """Find the `count` tokens that each row raises and lowers most, strongest first, and logits.

    `bar` is called with how many rows were done.
    """
    count = min(count, vocabulary)
    raised: list[Ends] = []
    lowered: list[Ends] = []
    for rows_RD in torch.split(W_dec_FD, max(1, ENTRIES_AT_ONCE // vocabulary)):
        logits_RV = lens.logits(rows_RD)[:, :vocabulary]
        for ends, largest in ((raised, True), (lowered, False)):
            values, tokens = logits_RV.topk(count, largest=largest)
            ends.append((tokens.cpu(), values.cpu()))
        bar(len(rows_RD))
    return [(torch.cat([t for t, _ in ends]), torch.cat([v for _, v in ends])) for ends in (raised, lowered)]


@torch.inference_mode()
def neighbours(
    W_dec_FD: Float[Tensor, "F D"],
    count: int,
    bar: Callable[[int], Any],
    among_GD: Float[Tensor, "G D"] | None = None,
) -> Ends:
    """Find the `count` rows with the largest cosine to each row, nearest first: of the others, or of `among_GD`.

    `bar` is called with how many rows were done.
    """
    unit_FD = nn.functional.normalize(W_dec_FD.float())
    unit_GD = unit_FD if among_GD is None else nn.functional.normalize(among_GD.float())
    width = len(unit_GD)
    nearest = []
    at_once = max(1, ENTRIES_AT_ONCE // width)
    for first in range(0, len(unit_FD), at_once):
        rows_RD = unit_FD[first : first + at_once]
        cosine_RG = rows_RD @ unit_GD.t()
        if among_GD is None:
            own = torch.arange(len(rows_RD), device=cosine_RG.device)
            cosine_RG[own, first + own] = -torch.inf
        values, latents = cosine_RG.topk(min(count, width - (among_GD is None)))
        nearest.append((latents.cpu(), values.cpu()))
        bar(len(rows_RD))
    return torch.cat([latents for latents, _ in nearest]), torch.cat([values for _, values in nearest])
