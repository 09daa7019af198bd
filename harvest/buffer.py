"""What lies between the forward and the disk: room for the rows of a unit, and the one thread that writes them.

While a unit is written the next is run into a second room, and from a CUDA device its rows come over beside the
forward, which waits for neither. So a process holds two units, however long it runs. N rows of a unit, D width.
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
    """From memory to a device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class ActivationBuffer:
    """Room for one unit's rows at each site, in the order of the text; used again for unit after unit.

    rows: at most so many. dtype: of storage.
    """

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.capacity, self.dtype = rows, dtype
        self._rooms: dict[str, Tensor] = {}
        self._peaks: dict[str, Tensor] = {}  # of this unit, where the rows come from
        self._tops: dict[str, Tensor] = {}  # the same, here
        self._lanes: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self) -> None:
        """Forget the unit before."""
        self._peaks.clear()

    def take(self, site: str, at: int, x_BTD: Tensor, kept: Tensor) -> None:
        """Have the rows `kept` of the B*T rows of x, as row `at` and on; waits for no CUDA device, but `wait` does."""
        if not len(kept):
            return
        x_ND = x_BTD.flatten(0, 1)
        if site not in self._rooms:
            pinned = x_ND.device.type == "cuda"
            self._rooms[site] = torch.empty((self.capacity, x_ND.shape[1]), dtype=self.dtype, pin_memory=pinned)
            self._tops[site] = torch.empty((), pin_memory=pinned)
        room = self._rooms[site][at : at + len(kept)]
        if x_ND.device == room.device and x_ND.dtype == room.dtype:
            rows = torch.index_select(x_ND, 0, kept, out=room)  # fresh memory costs more than the copy
        else:
            rows = x_ND.index_select(0, send(kept, x_ND.device)).to(self.dtype)
            self._bring(rows, room)
        least, most = torch.aminmax(rows)  # NaN, both of them, where a value is
        peak = torch.maximum(-least, most).float()
        self._peaks[site] = torch.maximum(self._peaks.get(site, peak), peak)
        self._bring(self._peaks[site], self._tops[site])

    def _bring(self, x: Tensor, room: Tensor) -> None:
        device = x.device
        if device.type != "cuda":
            room.copy_(x)
            return
        lane = self._lanes[device] = self._lanes.get(device) or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        lane.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(lane):
            room.copy_(x, non_blocking=True)
        x.record_stream(lane)  # or its memory would be used again before the copy is over

    def wait(self) -> None:
        """Return once all that was taken is here."""
        for lane in self._lanes.values():
            lane.synchronize()

    def peak(self, site: str) -> float:
        """The largest |x| of the unit at a site, NaN if a value is; 0 where it has no row."""
        return float(self._tops[site]) if site in self._peaks else 0.0

    def rows(self, site: str, n: int) -> Tensor:
        """The first `n` rows [N, D]."""
        return self._rooms[site][:n]


def native(x_ND: Tensor) -> Rows:
    """The memory of a tensor as numpy has it, which knows bfloat16 by its bits only."""
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
        rows: int,
        dtype: torch.dtype,
    ) -> None:
        self._write, self._ended = write, ended
        self._rooms = cycle((ActivationBuffer(rows, dtype), ActivationBuffer(rows, dtype)))
        self._pool = ThreadPoolExecutor(1, "writer")
        self._last: tuple[Unit, Future[None]] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def room(self) -> ActivationBuffer:
        """Where the next unit's rows go, until it is handed over."""
        held = next(self._rooms)
        held.begin()
        return held

    def hand_over(self, unit: Unit, held: ActivationBuffer, claim: ExitStack) -> None:
        """Have a unit written, and its claim given up after that; the one before is committed when this returns."""
        with claim:
            self.finish()
            mine = claim.pop_all()
        self._last = unit, self._pool.submit(self._run, unit, held, mine)

    def _run(self, unit: Unit, held: ActivationBuffer, claim: ExitStack) -> None:
        with claim:
            held.wait()
            self._write(unit, held)

    def finish(self) -> None:
        """Return when the last unit handed over is written, or raise why it is not."""
        if self._last is None:
            return
        (unit, writing), mine = self._last, True
        try:
            writing.result()
        except LeaseLost:
            mine = False
        self._last = None
        self._ended(unit, mine)
