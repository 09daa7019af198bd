"""A stand-in for a CUDA graph where there is no card: it records torch's operations and does them again.

As a CUDA graph it sees tensors alone: a number of Python's is the one it was as the recording was made, each tensor is
read and written where it lay then, and an operation whose result the host would wait for is refused. So a step that
comes out right by it reads nothing that a graph would have frozen. Unlike a graph it does the work as it records, which
is undone; and it holds every tensor of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.counter import WAITS
from train.cuda_graph import Figures

Operation = tuple[Any, ...]  # what is called, its arguments, and what it gave


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operation, and what each tensor that it writes to held before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masked = name == "index" and any(tensor.dtype == torch.bool for tensor in _tensors(args[1]))
        if name in WAITS or masked:
            raise RuntimeError(f"a step that is captured cannot wait for the device: {name}")
        if func._schema.is_mutable:
            for tensor in _tensors((args, kwargs)):
                self._keep(tensor)
        out = func(*args, **kwargs)
        made = _tensors(out)
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in inputs]
        self.made |= {tensor.untyped_storage()._cdata for tensor in fresh}
        # By aliases: an operation that changes a tensor's shape in place would else change it for those before it.
        self.operations.append(tree_map_only(Tensor, torch.Tensor.detach, (func, args, kwargs, made)))
        return out

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.made and storage._cdata not in self.before:
            self.before[storage._cdata] = (storage, storage.clone())  # type: ignore[no-untyped-call]


class RecordedGraph:
    """What a test or a machine without a card has for `train.cuda_graph.CudaGraph`."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self.replays = 0

    def warm_up(self, act: Callable[[], Figures]) -> Figures:
        return act()

    def capture(self, act: Callable[[], Figures]) -> Figures:
        recorder = _Recorder()
        with recorder:
            figures = act()
        for storage, before in recorder.before.values():
            storage.copy_(before)
        self._operations = recorder.operations
        return figures

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self._operations:
            if func.is_view or torch.Tag.inplace_view in func.tags:
                continue  # of a tensor that stays where it is
            again = _tensors(func(*args, **kwargs))
            for own, new in zip(made, again, strict=True):
                if own.shape != new.shape:
                    raise RuntimeError(f"{func} has another size in a replay: {[*own.shape]}, then {[*new.shape]}")
                if own.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    own.copy_(new)
