"""The processes that run one language model together, each with its part of every weight (tensor parallelism).

torchrun starts them; transformers splits the model by the plan of its architecture. All of them run the same forwards
and have the whole tensor at every site of the residual stream. The first one alone looks at the store, decides what is
run and writes; the others follow it. To import this module loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from data.base.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
# The others wait for the first one, which may wait for what other workers have begun. That a process died is for
# torchrun to see, which then ends the rest.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class ModelRanks:
    """This process among those that run one model; alone, nothing is sent.

    rank: its number, 0 for the one that decides. size: how many they are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this is the process that decides and writes."""
        return self.rank == 0

    def send(self, value: Any) -> None:
        """Send a value from the first process to the others, each of which is in `receive`."""
        assert self.leads
        if self.size > 1:
            _broadcast([value])

    def receive(self) -> Any:
        """Wait for what the first process sends next."""
        assert not self.leads
        box: list[Any] = [None]
        _broadcast(box)
        return box[0]

    def agree(self, decide: Callable[[], T]) -> T:
        """Return what `decide` gives in the first process, in all of them; the UserError that it raises, likewise."""
        if not self.leads:
            error, value = self.receive()
            if error is not None:
                raise UserError(error)
            decided: T = value
            return decided
        try:
            decided = decide()
        except UserError as error:
            self.send((str(error), None))
            raise
        self.send((None, decided))
        return decided

    def require_whole(self, seen: Mapping[str, Tensor]) -> None:
        """Raise UserError for a site where the processes have different tensors: each has a part of it only."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for site, x_BTD in seen.items():
            # One row says it: a part is narrower than the whole, or other numbers.
            mine_D = x_BTD[0, -1].float().cpu()
            first_D = self.agree(mine_D.clone)
            near = 0.01 * float(first_D.abs().max())
            parted = mine_D.shape != first_D.shape or not torch.allclose(mine_D, first_D, 0, near, equal_nan=True)
            n_parted = torch.tensor(int(parted))
            dist.all_reduce(n_parted)
            if n_parted.item():
                raise UserError(
                    f"site {site}: with tp_plan each process has a part of this tensor only: choose a site of "
                    "the residual stream, or what attention or the MLP reads or adds to it"
                )


ONE_PROCESS = ModelRanks()


def _broadcast(box: list[Any]) -> None:
    """Fill the box of every process with what is in that of the first."""
    import torch
    import torch.distributed as dist

    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))


@contextmanager
def join_ranks(tp_plan: str | None) -> Iterator[ModelRanks]:
    """Join the processes that run one model, which is this one alone without a plan.

    UserError where torchrun has started no others, or more of them than this host has GPUs.
    """
    if tp_plan is None:
        yield ONE_PROCESS
        return
    import torch
    import torch.distributed as dist

    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        raise UserError(
            "tp_plan splits the model over the processes of torchrun, and this one is alone: "
            "start it with torchrun --nproc-per-node N, or use device_map=auto instead"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"tp_plan needs a GPU for each process, and this host has {torch.cuda.device_count()}: "
                "start as many processes with torchrun --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"  # what is agreed on goes by the CPU, and waits for no GPU
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group(backend, timeout=_PATIENCE)
    yield ModelRanks(dist.get_rank(), dist.get_world_size())
    # Not after an error: another process may be in the middle of a forward, and would never come here.
    if ours:
        dist.destroy_process_group()
