"""What a harvest in bfloat16 gains over one in float32, and what it costs: `model.dtype`.

    python -m benchmarks.compute_dtype --model path/to/model --sites resid_post.9 resid_post.14 [--rounds 5]

Speed: forwards to the last site in both dtypes, in turn. Error: the NMSE of the rows of a bfloat16 forward against
those of the float32 one, over the ordinary rows (a few massive ones would decide it), beside that of float32 rows that
are only stored as bfloat16. The text is the beginning of the standard library.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.base.cpu import has_amx
from data.base.sites import Site
from data.store.manifest import TRAIN
from data.store.massive import TIMES_MEDIAN
from harvest import lm
from harvest.documents import StdlibText
from harvest.hooks import run_to
from harvest.packing import Packing, pack

CONTEXT = 256


def nmse(x_ND: Tensor, other_ND: Tensor) -> float:
    """Compute the squared error of the other rows over the variance, in float64."""
    x, other = x_ND.double(), other_ND.double()
    return float((x - other).square().sum() / (x - x.mean(0)).square().sum())


def rows_of(model: Any, sites: Sequence[Site], contexts: Tensor, lm_batch: int) -> dict[str, Tensor]:
    """Read all rows of the sites [N, D] in the model's dtype."""
    parts: dict[str, list[Tensor]] = {str(site): [] for site in sites}
    for first in range(0, len(contexts), lm_batch):
        for site, x_BTD in run_to(model, sites, contexts[first : first + lm_batch]).items():
            parts[site].append(x_BTD.flatten(0, 1))
    return {site: torch.cat(batches) for site, batches in parts.items()}


def measure(name: str, sites: Sequence[Site], contexts: int, lm_batch: int, rounds: int) -> None:
    """Print the speeds, and each site's NMSE of bfloat16 compute and of bfloat16 storage alone."""
    models = {
        dtype: lm.load_model({"name": name, "dtype": dtype, "device": "cpu"}) for dtype in ("float32", "bfloat16")
    }
    packing = Packing.of({"context": CONTEXT, "bos": "none"})
    packed = pack(StdlibText(), lm.load_tokenizer({"name": name}), packing, TRAIN, contexts * CONTEXT)
    ids = torch.from_numpy(packed.contexts[:contexts].astype(np.int64))
    seconds: dict[str, list[float]] = {dtype: [] for dtype in models}
    rows: dict[str, dict[str, Tensor]] = {}
    for turn in range(rounds + 1):  # the first warms up
        for dtype, model in models.items():
            began = time.perf_counter()
            rows[dtype] = rows_of(model, sites, ids, lm_batch)
            if turn:
                seconds[dtype].append(time.perf_counter() - began)
    print(f"AMX: {'yes' if has_amx() else 'no'}; {torch.get_num_threads()} threads; {ids.numel():,} tokens a round")
    for dtype, values in seconds.items():
        print(f"{dtype:<10}{ids.numel() / statistics.median(values):>10.0f} tokens/s")
    ratios = sorted(one / two for one, two in zip(*seconds.values(), strict=True))
    print(f"bfloat16 is {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    for site in map(str, sites):
        exact_ND = rows["float32"][site]
        norms_N = exact_ND.norm(dim=1)
        ordinary_N = norms_N <= TIMES_MEDIAN * norms_N.median()
        exact_ND = exact_ND[ordinary_N]
        compute = nmse(exact_ND, rows["bfloat16"][site][ordinary_N])
        storage = nmse(exact_ND, exact_ND.bfloat16())
        print(f"{site}: NMSE {compute:.1e} of bfloat16 compute, {storage:.1e} of bfloat16 storage alone")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="embedded", help="a folder, a GGUF file or a name on the hub")
    parser.add_argument("--sites", nargs="+", default=["resid_post.3"])
    parser.add_argument("--contexts", type=int, default=32, help=f"of {CONTEXT} tokens, a round")
    parser.add_argument("--lm-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    sites = [Site.parse(name) for name in options.sites]
    measure(options.model, sites, options.contexts, options.lm_batch, options.rounds)


if __name__ == "__main__":
    main()
