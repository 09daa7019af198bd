"""What several ranks select together of a batch that is split over them.

Letters: n entries of this rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

_DIGIT = 11  # bits a round: 2,048 counts, 16 KB, for every rank
_BINS = 1 << _DIGIT


@torch.no_grad()
def largest_over_ranks(values_n: Float[Tensor, " n"], count: int) -> tuple[Bool[Tensor, " n"], Float[Tensor, ""]]:
    """Mark which of this rank's values are among the `count` largest above zero of all ranks, and find the smallest.

    A tie goes to the lower rank, and within a rank to the entry that comes first: the choice of one process that has
    the ranks' batches one after another. `values_n` must hold this rank's share of the choice, such as its own `count`
    largest. The smallest is 0 where fewer than `count` are positive, and is the same on every rank.

    Exact: positive floats are in order as the integers of the same bits, so a few rounds of summed histograms, 11 bits
    each from the highest, spell out the bits of the count-th largest. Every rank takes part in every round, whatever
    it holds, and nothing waits for the device. What is not a number counts as kept, so that it reaches the loss.
    """
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[values_n.dtype]
    keys_n = values_n.contiguous().view(integer)
    positive_n = values_n > 0
    left = positive_n.sum()
    dist.all_reduce(left)
    enough = left >= count
    left = left.clamp(max=count)  # how many of those that share the bits found so far are still to be taken
    alike_n = positive_n  # entries whose higher bits are those of the smallest
    smallest = keys_n.new_zeros(())
    sign_free = torch.iinfo(integer).bits - 1
    for shift in range((sign_free - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
        digit_n = keys_n.bitwise_right_shift(shift).bitwise_and(_BINS - 1)
        counts = torch.zeros(_BINS, dtype=torch.int64, device=values_n.device)
        counts.index_add_(0, digit_n.long(), alike_n.long())
        dist.all_reduce(counts)
        reached = counts.flip(0).cumsum(0).flip(0)  # entries with this digit or a higher one
        digit = (reached >= left).sum() - 1
        left = left - (reached[digit] - counts[digit])
        alike_n = alike_n & (digit_n == digit)
        smallest = smallest | digit.to(integer).bitwise_left_shift(shift)
    # `alike_n` are now the ties at the smallest, of which `left` are taken over all ranks: lower ranks' first.
    ties = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=values_n.device)
    ties[dist.get_rank()] = alike_n.sum()
    dist.all_reduce(ties)
    here = left - ties[: dist.get_rank()].sum()
    taken_n = alike_n & (alike_n.cumsum(0) <= here)
    kept_n = (positive_n & (keys_n > smallest)) | taken_n | values_n.isnan()
    bound = smallest.view(values_n.dtype)
    return kept_n, torch.where(enough, bound, torch.zeros_like(bound))
