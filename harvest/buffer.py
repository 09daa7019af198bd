"""What lies between the forward and the disk: buffers for the rows of a unit, and the one thread that writes them.

While a unit is written the next is run into a second buffer, and from a CUDA device its rows come over beside the
forward, which waits for neither. So a process has two units in memory, however long it runs. N rows of a unit, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import cycle
from types import TracebackType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from data.storage.base import LeaseLost
from harvest.units import Unit

Rows = NDArray[Any]


def send(x: Tensor, device: torch.device) -> Tensor:
    """Send from memory to a device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class ActivationBuffer:
    """Memory for one unit's rows at each site, in the order of the text; used again for unit after unit.

    capacity: the most rows it takes. dtype: of storage.
    """

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.capacity, self.dtype = capacity, dtype
        self._rows: dict[str, Tensor] = {}
        # The largest |x| of this unit: on the rows' own device, and copied here beside them.
        self._max_there: dict[str, Tensor] = {}
        self._max_here: dict[str, Tensor] = {}
        self._copy_streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self) -> None:
        """Forget the unit before."""
        self._max_there.clear()

    def append(self, site: str, at: int, x_BTD: Tensor, keep_N: Tensor) -> None:
        """Copy the rows `keep_N` of the B*T rows of x to row `at` and on.

        Returns before a CUDA device has copied them: `wait` is for that.
        """
        if not len(keep_N):
            return
        x_ND = x_BTD.flatten(0, 1)
        if site not in self._rows:
            pinned = x_ND.device.type == "cuda"
            self._rows[site] = torch.empty((self.capacity, x_ND.shape[1]), dtype=self.dtype, pin_memory=pinned)
            self._max_here[site] = torch.empty((), pin_memory=pinned)
        target = self._rows[site][at : at + len(keep_N)]
        if x_ND.device == target.device and x_ND.dtype == target.dtype:
            rows = torch.index_select(x_ND, 0, keep_N, out=target)  # fresh memory costs more than the copy
        else:
            rows = x_ND.index_select(0, send(keep_N, x_ND.device)).to(self.dtype)
            self._copy(rows, target)
        least, most = torch.aminmax(rows)  # NaN, both of them, where a value is
        largest = torch.maximum(-least, most).float()
        self._max_there[site] = torch.maximum(self._max_there.get(site, largest), largest)
        self._copy(self._max_there[site], self._max_here[site])

    def _copy(self, x: Tensor, target: Tensor) -> None:
        """Copy to memory here; from a CUDA device in a stream of its own, beside what comes next."""
        device = x.device
        if device.type != "cuda":
            target.copy_(x)
            return
        if device not in self._copy_streams:
            self._copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._copy_streams[device]
        # The copy must not begin before the forward has made what it copies.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(x, non_blocking=True)
        x.record_stream(stream)  # or its memory would be used again before the copy is over

    def wait(self) -> None:
        """Return once all that was appended is here."""
        for stream in self._copy_streams.values():
            stream.synchronize()

    def max_abs(self, site: str) -> float:
        """Return the largest |x| of the unit at a site, NaN if a value is; 0 where it has no row."""
        return float(self._max_here[site]) if site in self._max_there else 0.0

    def rows(self, site: str, n: int) -> Tensor:
        """Return the first `n` rows [N, D]."""
        return self._rows[site][:n]


def native(x_ND: Tensor) -> Rows:
    """Return the memory of a tensor as numpy has it, which knows bfloat16 by its bits only."""
    return x_ND.view(torch.uint16).numpy() if x_ND.dtype is torch.bfloat16 else x_ND.numpy()


class Writer:
    """Writes units one after another in a thread of its own; leaving the `with` block waits for it.

    write: called with a unit and its rows, and raises LeaseLost where another process was faster. ended: called in the
    thread of the caller, with each unit written and whether it was this process that committed it.
    """

    def __init__(
        self,
        write: Callable[[Unit, ActivationBuffer], None],
        ended: Callable[[Unit, bool], None],
        capacity: int,
        dtype: torch.dtype,
    ) -> None:
        self._write, self._ended = write, ended
        self._buffers = cycle((ActivationBuffer(capacity, dtype), ActivationBuffer(capacity, dtype)))
        self._pool = ThreadPoolExecutor(1, "writer")
        self._last: tuple[Unit, Future[None]] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def next_buffer(self) -> ActivationBuffer:
        """Return the buffer for the next unit's rows, until it is submitted."""
        buffer = next(self._buffers)
        buffer.begin()
        return buffer

    def submit(self, unit: Unit, buffer: ActivationBuffer, lease: ExitStack) -> None:
        """Have a unit written, and its lease given up after that; the one before is committed when this returns."""
        with lease:
            self.finish()
            ours = lease.pop_all()
        self._last = unit, self._pool.submit(self._run, unit, buffer, ours)

    def _run(self, unit: Unit, buffer: ActivationBuffer, lease: ExitStack) -> None:
        with lease:
            buffer.wait()
            self._write(unit, buffer)

    def finish(self) -> None:
        """Return when the last unit submitted is written, or raise why it is not."""
        if self._last is None:
            return
        unit, writing = self._last
        by_us = True
        try:
            writing.result()
        except LeaseLost:
            by_us = False
        self._last = None
        self._ended(unit, by_us)
