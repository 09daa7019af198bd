"""What depends on the step alone: pure functions, so a resumed run needs no schedule state of its own."""

from __future__ import annotations

from dataclasses import dataclass


def ramp(step: int, steps: int) -> float:
    """Return a linear rise over the first `steps` steps,
    from 1/steps at step 0 to 1 at the last; 1 where steps is 0."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


_SLOW_START = 175  # steps, at most half of the run; measured, see benchmarks/RESULTS.md


@dataclass(frozen=True)
class Schedule:
    """A run of `total` optimizer steps; warm-ups and decay are counted in steps."""

    total: int
    lr_warmup: int
    lr_decay: int
    sparsity_warmup: int

    @classmethod
    def of_shares(cls, total: int, lr_warmup: float, lr_decay: float, sparsity_warmup: float) -> Schedule:
        """Make a schedule with warm-ups and decay as shares of the run."""
        steps = [round(total * share) for share in (lr_warmup, lr_decay, sparsity_warmup)]
        return cls(total, *steps)

    def lr(self, step: int) -> float:
        """Return the factor on the learning rate: warm-up, flat, then linear to zero,
        reached one step after the last."""
        left = max(0, self.total - step)
        down = min(1.0, left / self.lr_decay) if self.lr_decay else 1.0
        return min(ramp(step, self.lr_warmup), down)

    def sparsity(self, step: int) -> float:
        """Return the factor on the sparsity penalty."""
        return ramp(step, self.sparsity_warmup)

    def settled(self, step: int) -> float:
        """Return how much of the slow start is over, from 0 to 1, of a coefficient that follows a wanted L0."""
        return max(0.0, ramp(step - self.sparsity_warmup, min(_SLOW_START, self.total // 2)))
