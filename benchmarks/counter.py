"""What torch's operations do to a device, seen as they are dispatched: bytes moved, memory, waits of the host."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that reserve memory and run nothing.
_RESERVE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
_SAME = {"_unsafe_view", "lift_fresh"}  # a view by another name
# Operations for whose result the host waits: a value, or a size that depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_PICK = {"index_select", "index", "gather", "embedding"}  # read what they pick, and not the whole table
_PUT = {"index_add_", "index_add", "index_fill_", "index_copy_", "index_put_", "scatter_", "scatter_add_"}
_OVERWRITE = {"fill_", "zero_", "copy_"}  # do not read what they write to
# Passes over the input of what a GPU does in several: radix selection and radix sort take 8 bits a pass.
_PASSES = {"topk": 5, "sort": 4, "kthvalue": 5}


@dataclass(frozen=True)
class Operation:
    """One operation that runs on the device."""

    name: str
    part: str
    """Which part of the step it belongs to; see `Counter`."""
    read: int
    """Bytes."""
    written: int
    """Bytes."""
    waits: bool
    """Whether the host waits for its result."""


def extent(tensor: Tensor) -> int:
    """Compute the bytes of a tensor's entries, those of an expanded dimension once."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride else min(size, 1)
    return entries * tensor.element_size()


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each of torch's operations, and the storages that live.

    An operation belongs to the part that `within` names, or by what it touches: `products`, `parameters` (a tensor of
    `parameter_entries`), `z` (one of `z_entries`) or `rest`. `candidates` is the number of entries that `nonzero`
    finds in a fake tensor.
    """

    def __init__(self, *, parameter_entries: int = -1, z_entries: int = -1, candidates: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameter_entries, self.z_entries, self.candidates = parameter_entries, z_entries, candidates
        self.operations: list[Operation] = []
        self.live, self.peak = 0, 0
        self.held: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.part: str | None = None
        self.paused = False

    def begin(self) -> None:
        """Forget the operations so far, and count the peak of the memory from here."""
        self.operations = []
        self.peak = self.live

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Name the part of the step that the operations of the `with` block belong to."""
        before, self.part = self.part, self.part or part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def kernel(self, part: str, read: int, written: int) -> Iterator[None]:
        """Count the `with` block as one operation of so many bytes, whatever stands in for it."""
        self.operations.append(Operation("kernel", part, read, written, waits=False))
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor's memory for as long as it lives."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self.held and self.held[key][0]() is storage:
            return
        size = storage.nbytes()
        self.held[key] = (weakref.ref(storage, lambda _, key=key, size=size: self._freed(key, size)), size)  # type: ignore[misc]
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self.held.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "nonzero" and isinstance(args[0], FakeTensor):
            out = args[0].new_empty(self.candidates, args[0].dim(), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        if self.paused or func.namespace == "prim":  # prim: a fake tensor was asked for its device
            return out
        for tensor in _tensors(out):
            self.watch(tensor)
        if not (func.is_view or name in _RESERVE or name in _SAME):
            self.operations.append(self._operation(func, name, args, kwargs, out))
        return out

    def _operation(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Operation:
        read, written = traffic(func, name, args, kwargs, out)
        tensors = _tensors((args, kwargs, out))
        masked = name == "index" and any(tensor.dtype == torch.bool for tensor in _tensors(args[1]))
        part = "products" if name in _PRODUCTS else self.part
        if part is None:
            part = self._by_size({tensor.numel() for tensor in tensors})
        return Operation(name, part, read, written, waits=name in WAITS or masked)

    def _by_size(self, entries: set[int]) -> str:
        if self.parameter_entries in entries:
            return "parameters"
        return "z" if self.z_entries in entries else "rest"


def _tensors(values: Any) -> list[Tensor]:
    """List the dense tensors among nested values; a sparse one's parts are dense tensors that were seen before."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.layout == torch.strided]


def traffic(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> tuple[int, int]:
    """Count the bytes that an operation reads and writes: each input and output once, with the exceptions above."""
    inputs = _tensors((args, kwargs))
    fresh = sum(extent(tensor) for tensor in _tensors(out) if not any(_same(tensor, other) for other in inputs))
    if name in _PICK:
        return sum(extent(tensor) for tensor in inputs[1:]) + fresh, fresh
    if name in _PUT:
        put = max((extent(tensor) for tensor in inputs[1:] if tensor.is_floating_point()), default=0)
        return sum(extent(tensor) for tensor in inputs[1:]) + put + fresh, put + fresh
    if name == "_fused_adam_":
        weights, _, *states = args[:4]
        every = sum(extent(tensor) for tensor in _tensors(args[:4]))
        return every, sum(extent(tensor) for tensor in _tensors((weights, states)))
    mutated = _mutated(func, args, kwargs)
    unread = mutated if name in _OVERWRITE or "out" in kwargs else []
    read = sum(extent(tensor) for tensor in inputs if not any(tensor is other for other in unread))
    written = sum(extent(tensor) for tensor in mutated) + fresh
    return read * _PASSES.get(name, 1), written * (_PASSES["sort"] if name == "sort" else 1)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage() is other.untyped_storage()


def _mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """List the tensors that an operation's schema says it writes to."""
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found += _tensors(given)
    return found
