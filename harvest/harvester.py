"""The unit loop: contexts through the language model, several sites at once, rows permuted, written, committed.

A unit is run in fixed batches, so its bytes do not depend on what was harvested before it, on an interruption, or on
which other sites are taken with it. It is written while the next is run (harvest/buffer.py). Letters: B contexts in a
batch, T tokens of a context, N rows of a unit, D width of a site.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from data.base.errors import UserError
from data.base.files import format_bytes
from data.base.progress import progress
from data.base.records import Json
from data.base.sites import Site
from data.store.int8 import FeatureScale
from data.store.manifest import TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from harvest.buffer import ActivationBuffer, Rows, Writer, native, send
from harvest.hooks import capture, run_to
from harvest.int8_scales import measure_scales
from harvest.lm import input_device
from harvest.model_ranks import ONE_PROCESS, ModelRanks
from harvest.packing import PackedText
from harvest.units import INDEX_WIDTHS, Unit, refuse_mixed

POLL_S = 0.2  # between looks at units that other processes have
FLOAT16_LIMIT = 6e4  # float16 ends at 65,504; so near to it, other tokens are likely beyond


def widths_of(
    model: nn.Module, sites: Sequence[Site], packed: PackedText, ranks: ModelRanks = ONE_PROCESS
) -> dict[str, int]:
    """Measure the width of each site, by a forward of one context.

    UserError where the model has no such site, and where its processes have a part of its tensor each.
    """
    # By a forward, as configs name widths in many ways and a module's path says nothing of its own.
    seen = run_to(model, sites, _ids(packed.contexts[:1], model))
    ranks.require_whole(seen)
    return {name: x_BTD.shape[-1] for name, x_BTD in seen.items()}


def made_by(model: nn.Module, processes: int = 1) -> Json:
    """Return the device and the libraries that the last bits of an activation depend on.

    processes: over how many the model is split.
    """
    # By accelerate's map where the model is spread: a weight that waits on disk is on no device.
    spread = getattr(model, "hf_device_map", None)
    kinds = {p.device for p in model.parameters()} if spread is None else _devices(spread)
    return {
        "device": ", ".join(sorted({_device_name(device) for device in kinds})),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **({"tensor_parallel": processes} if processes > 1 else {}),
    }


def _devices(device_map: Mapping[str, Any]) -> set[torch.device]:
    """Return the devices that compute: accelerate brings there what a map leaves in memory or on disk."""
    named = {device for device in device_map.values() if device not in ("cpu", "disk")}
    kinds = {torch.device("cuda", name) if isinstance(name, int) else torch.device(name) for name in named}
    return kinds or {torch.device("cpu")}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


class Harvester:
    """Runs the units that are left and commits them one by one, beside any other process that does so.

    model: in eval mode. packed: the contexts of each split. widths: D of each site. lm_batch: B. decode: token id
    to text, for messages. quiet: without a progress bar. ranks: the processes that run the model together; the first
    one calls `run`, the others `follow`.
    """

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        packed: Mapping[str, PackedText],
        widths: Mapping[str, int],
        lm_batch: int,
        decode: Callable[[int], str] = str,
        *,
        allow_mixed_devices: bool = False,
        quiet: bool = False,
        ranks: ModelRanks = ONE_PROCESS,
    ) -> None:
        self.ranks = ranks
        self.store, self.model, self.packed, self.widths = store, model, packed, widths
        self.lm_batch, self.decode = lm_batch, decode
        self.allow_mixed_devices, self.quiet = allow_mixed_devices, quiet
        self.layout = store.layout
        self.dtype: torch.dtype = getattr(torch, self.layout.dtype)
        self.made_by = made_by(model, ranks.size)
        self.written = 0  # bytes, by this process
        self._begun = False  # whether any unit was

    def run(self, units: Sequence[Unit]) -> int:
        """Return when all of `units` are committed, by this process or another; returns how many were by this one.

        Each is committed before the next but one begins. A unit that another process has is waited for, as that one
        may die.
        """
        self._refuse_mixed()
        self.make_arrays(units)
        n_ours = 0
        left = list(units)
        again: list[Unit] = []  # that another process has, or was faster with
        rows = sum(unit.rows for unit in units)
        with progress("harvest", rows, "tokens", quiet=self.quiet) as bar:

            def ended(unit: Unit, by_us: bool) -> None:
                nonlocal n_ours
                n_ours += by_us
                bar.set_postfix_str(f"{format_bytes(self.written)} written", refresh=False)
                if not by_us:
                    bar.update(-unit.rows)
                    again.append(unit)

            with Writer(self.write_unit, ended, self.layout.unit_rows, self.dtype) as writer:
                while left:
                    for unit in left:
                        if not self._begin(unit, writer, bar):
                            again.append(unit)
                    writer.finish()
                    # None of what is left could be begun: others have all of it. Not an error, as one of them may die.
                    if len(again) == len(left):
                        time.sleep(POLL_S)
                    left, again = again, []
        self.ranks.send(None)
        return n_ours

    def follow(self) -> None:
        """Run this process's part of each forward that the first process begins, until that one is done."""
        while (order := self.ranks.receive()) is not None:
            if isinstance(order, Unit):
                for _ in self._forwards(order):
                    pass
            else:
                self._measure_scales(order)

    def _begin(self, unit: Unit, writer: Writer, bar: Any) -> bool:
        """Run a unit and have it written, unless it is committed; False where another process has it."""
        if not unit.left(self.store).names:
            bar.update(unit.rows)
            return True
        with ExitStack() as lease:
            if not lease.enter_context(self.store.leases.take(unit.split, unit.index, unit.names, self.made_by)):
                return False
            if not self._begun:  # of two that began an empty store at once, one at least sees the other here
                self._refuse_mixed()
            self._begun = True
            left = unit.left(self.store)
            # Looked at again under the lease: another may have committed the unit between the first look and now.
            if left.names:  # else committed between the look and the lease
                buffer = writer.next_buffer()
                self.run_unit(left, buffer, bar)
                # The lease goes with the buffer to the writing thread, which gives it back when the unit is committed.
                writer.submit(left, buffer, lease.pop_all())
            else:
                bar.update(unit.rows)
        return True

    def _refuse_mixed(self) -> None:
        if not self.allow_mixed_devices:
            refuse_mixed(self.store, self.made_by)

    def write_unit(self, unit: Unit, buffer: ActivationBuffer) -> None:
        """Permute, write and commit the rows of a unit."""
        self._refuse_unstorable(unit, buffer)
        # One order for all sites, tokens and origin of the unit, so that row i is the same token in each of them.
        order = self.store.permutation(unit.split, unit.index, unit.rows)
        index_arrays = self._index_arrays(unit)
        for name in unit.names:
            rows = index_arrays[name] if name in index_arrays else native(buffer.rows(name, unit.rows))
            commit = self.store.write(unit.split, unit.index, name, rows, self.made_by, order)
            self.written += sum(chunk.bytes for chunk in commit.chunks)

    def _index_arrays(self, unit: Unit) -> dict[str, Rows]:
        """Make the token id [N] and (sequence, position) [N, 2] of each row, in the order of the text."""
        text = self.packed[unit.split]
        keep = text.keep[unit.contexts]
        sequence, position = np.nonzero(keep)
        origin = np.stack([sequence + unit.contexts.start, position], axis=1).astype(np.int32)
        return {TOKENS: text.contexts[unit.contexts][keep], ORIGIN: origin}

    def make_arrays(self, units: Sequence[Unit]) -> None:
        """Make or grow the arrays, once for the whole run and before anything is claimed."""
        sites = sorted({site for unit in units for site in unit.sites})
        unscaled = [site for site in sites if self._needs_scale(site)]
        scales = {}
        if unscaled:
            self.ranks.send(unscaled)
            scales = self._measure_scales(unscaled)
        for split in self.packed:
            of_split = [unit for unit in units if unit.split == split]
            if not of_split:
                continue
            capacity = (of_split[-1].index + 1) * self.layout.unit_rows
            for name in sorted({name for unit in of_split for name in unit.names}):
                width = self.widths.get(name, INDEX_WIDTHS.get(name, 0))
                self.store.require(split, name, width, capacity, scales.get(name))

    def _measure_scales(self, sites: Sequence[str]) -> dict[str, FeatureScale]:
        return measure_scales(self.model, self.packed[TRAIN], self.layout, self.lm_batch, sites)

    def _needs_scale(self, site: str) -> bool:
        """Return whether the site's rows are int8 and no array of it says yet by which scale."""
        rows = self.store.rows_of(site)
        return rows.is_int8 and rows.standard is None

    def run_unit(self, unit: Unit, buffer: ActivationBuffer, bar: Any) -> None:
        """Run a unit's contexts; `buffer` takes the rows of each site, in the order of the text."""
        if not unit.sites:
            bar.update(unit.rows)
            return
        self.ranks.send(unit)
        at = 0  # rows in the buffer
        for seen, keep_N in self._forwards(unit):
            for site in unit.sites:
                buffer.append(site, at, seen[site], keep_N)
            at += len(keep_N)
            bar.update(len(keep_N))

    def _forwards(self, unit: Unit) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Run a unit's contexts in batches: the tensor of each site, and which of its B*T rows are stored."""
        text = self.packed[unit.split]
        contexts, keep = text.contexts[unit.contexts], text.keep[unit.contexts]
        with torch.no_grad(), capture(self.model, [Site.parse(site) for site in unit.sites]) as seen:
            for first in range(0, len(contexts), self.lm_batch):
                batch = contexts[first : first + self.lm_batch]
                mask = keep[first : first + self.lm_batch]
                # Contexts are whole and of one length, so there is no padding and no mask.
                self.model(input_ids=_ids(batch, self.model), use_cache=False)
                # Found here: a GPU that looks for them itself makes the forward wait for their number.
                yield seen, torch.from_numpy(np.flatnonzero(mask))

    def _refuse_unstorable(self, unit: Unit, buffer: ActivationBuffer) -> None:
        """Raise UserError with site, text and token of the first value that is not finite, or too large for float16."""
        limit = FLOAT16_LIMIT if self.dtype is torch.float16 else torch.finfo(self.dtype).max
        site = next((site for site in unit.sites if not buffer.max_abs(site) <= limit), None)  # NaN compares false
        if site is None:
            return
        largest_N = torch.linalg.vector_norm(buffer.rows(site, unit.rows), float("inf"), dim=1)
        row = int((~(largest_N <= limit)).nonzero()[0])
        sequence, position = map(int, self._index_arrays(unit)[ORIGIN][row])
        text = self.packed[unit.split]
        token = int(text.contexts[sequence : sequence + 1][0, position])
        remedy = "too large for float16: set store.dtype=bfloat16 or float32"
        if self.dtype is not torch.float16:
            remedy = "which is not finite: set model.dtype=float32, or leave this text out"
        raise UserError(
            f"site {site} has |x| = {float(largest_N[row]):g} at token {position} ({self.decode(token)!r}) of "
            f"{unit.split} sequence {sequence}, document {text.document(sequence, position)}, {remedy}"
        )


def _ids(contexts: NDArray[np.int32], model: nn.Module) -> Tensor:
    """Convert to [B, T] int64 on the device where the model takes them."""
    return send(torch.from_numpy(contexts), input_device(model)).long()
