"""What can be read off an SAE's weights: the logits a decoder row raises and lowers, the token embeddings that a
transcoder's encoder reads, and the rows near a decoder row.

Letters: F latents, G latents of another SAE, R rows at a time, D width of the site, V vocabulary, K entries kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from data.base.sites import INPUT_KINDS, Site
from harvest.hooks import capture
from harvest.lm import input_device

ENTRIES_AT_ONCE = 1 << 25  # of a [R, V] or [R, F] product: 128 MB in float32


@runtime_checkable
class TokenScores(Protocol):
    """Gives each token a number for each of some rows."""

    def logits(self, rows_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Compute the numbers of R rows."""


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


class InputLens:
    """The token embeddings as an encoder reads them: behind the norm N before the module whose input it reads.

    logits(row) = N(E) @ row, less its mean over V: how much more than the mean token a token adds to z where its
    embedding alone is the residual stream. Positions and what earlier layers add are not in it (the direct path only).
    norm: None where the stream itself is read.
    """

    def __init__(self, embedding: nn.Module, norm: nn.Module | None) -> None:
        self.embedding, self.norm = embedding, norm

    @cached_property
    def read_VD(self) -> Float[Tensor, "V D"]:
        """Compute N(E), less its mean over the tokens."""
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        # By the module's own forward, as some multiply what they look up.
        rows_VD = self.embedding(torch.arange(len(weight), device=weight.device))
        read_VD: Tensor = (rows_VD if self.norm is None else self.norm(rows_VD)).float()
        return read_VD - read_VD.mean(0)

    @torch.inference_mode()
    def logits(self, rows_RD: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Compute what each token adds to z of R encoder directions, in model units."""
        return rows_RD.float().to(self.read_VD.device) @ self.read_VD.t()


Noted = list[tuple[nn.Module, Tensor, Tensor]]


@contextmanager
def _leaves_noted(model: nn.Module, without: nn.Module | None = None) -> Iterator[Noted]:
    """Note every module without parts, in the order in which they run, with the tensor it reads and what it makes."""
    noted: Noted = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor) and output.is_floating_point():
            noted.append((module, args[0], output))

    with ExitStack() as stack:
        for module in model.modules():
            if module is not without and not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(note).remove)
        yield noted


def _example_ids(model: nn.Module) -> Int64[Tensor, "1 T"]:
    return torch.arange(4, device=input_device(model))[None]


def _norm_that_made(noted: Sequence[tuple[nn.Module, Tensor, Tensor]], made: Tensor, width: int) -> nn.Module | None:
    """Find the last module that put out this tensor; None where there is none, or it maps other widths."""
    # The last, as an inner one may have put it out earlier.
    for module, given, output in reversed(noted):
        if output.numel() == made.numel() and torch.equal(output.reshape(made.shape), made):
            return module if given.shape[-1] == width == output.shape[-1] else None
    return None


@torch.inference_mode()
def find_input_lens(model: Any, site: Site, d_in: int) -> InputLens | None:
    """Find how the encoder of a site reads the token embeddings: behind the norm before attention or the MLP, found as
    the module whose output these read in a short forward, or as they are where the site is the residual stream.

    None where neither is so, or the embeddings are not of `d_in` entries.
    """
    embedding = model.get_input_embeddings()
    if embedding is None or embedding.weight.shape[-1] != d_in:
        return None
    if site.kind.startswith("resid_"):
        return InputLens(embedding, None)
    if site.kind not in INPUT_KINDS:
        return None
    with _leaves_noted(model) as noted, capture(model, [site], stop=False) as seen:
        model(input_ids=_example_ids(model), use_cache=False)
    norm = _norm_that_made(noted, seen[str(site)], d_in)
    return None if norm is None else InputLens(embedding, norm)


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
    with _leaves_noted(model, without=unembedding) as noted, ExitStack() as stack:
        stack.callback(unembedding.register_forward_pre_hook(lambda _, args: read.append(args[0])).remove)
        model(input_ids=_example_ids(model), use_cache=False)
    norm = _norm_that_made(noted, read[-1], d_in) if read else None
    return None if norm is None else Lens(norm, unembedding)


Ends = tuple[Int64[Tensor, "F K"], Float[Tensor, "F K"]]


def ends(
    lens: TokenScores, rows_FD: Float[Tensor, "F D"], vocabulary: int, count: int, bar: Callable[[int], Any]
) -> list[Ends]:
    """Find the `count` tokens that each row raises and lowers most, strongest first, and logits.

    `bar` is called with how many rows were done.
    """
    count = min(count, vocabulary)
    raised: list[Ends] = []
    lowered: list[Ends] = []
    for rows_RD in torch.split(rows_FD, max(1, ENTRIES_AT_ONCE // vocabulary)):
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
