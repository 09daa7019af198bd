"""What an evaluation costs beside the plain forwards it needs (clean, spliced, zero, mean), as a ratio of one run.

    python -m benchmarks.evaluate [--tokens 200000] [--sae outputs/train/...] [--site resid_post.3] [--lm-batch 16]

The embedded language model reads held-out text of the standard library. Batch by batch the evaluation of one SAE and
four plain forwards of the same contexts take turns, their order changing each time; the figure is the ratio of all
seconds, the spread the quartiles of the ratios of the batches. Without --sae a TopK of 1,536 latents is started from
the first batch. The bootstrap at the end counts as the evaluation's.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.base.cli import keep_freed_memory
from evaluate.score import SiteScore
from evaluate.splice import Splice
from harvest import lm
from harvest.documents import HELDOUT, StdlibText
from harvest.hooks import Site, run_to
from harvest.packing import Packing, pack
from train.sae.base import SAE
from train.sae.io import load
from train.sae.variants.topk import TopK

MODEL = {"name": "embedded", "device": "cpu"}
PACKING = Packing(context=256, bos="document", shuffle=None)
FORWARDS = 4
GOAL = 1.5


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def started(rows_ND: Tensor) -> SAE:
    """Return a TopK of 8 times the width, as training starts it."""
    sae = TopK(rows_ND.shape[1], 8 * rows_ND.shape[1], k=32)
    sae.initialise(rows_ND)
    return sae


def measure(score: SiteScore, ids: Tensor, keep: Tensor, lm_batch: int) -> tuple[list[float], list[float], float]:
    """Return the seconds of each batch, the evaluation's and the plain forwards', and those of the evaluation's end."""
    model = score.splice.model

    def plain(ids_BT: Tensor) -> None:
        with torch.inference_mode():
            for _ in range(FORWARDS):
                model(input_ids=ids_BT, use_cache=False)

    whole: list[float] = []
    bare: list[float] = []
    plain(ids[:lm_batch])
    for number, first in enumerate(range(0, len(ids), lm_batch)):
        ids_BT, keep_BT = ids[first : first + lm_batch], keep[first : first + lm_batch]
        for ours in (True, False) if number % 2 else (False, True):
            if ours:
                whole.append(seconds(functools.partial(score.batch, ids_BT, keep_BT, first)))
            else:
                bare.append(seconds(functools.partial(plain, ids_BT)))
    return whole, bare, seconds(lambda: score.result(samples=1000, seed=0))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--sae", help="the folder of a trained SAE")
    parser.add_argument("--site", default="resid_post.3")
    parser.add_argument("--lm-batch", type=int, default=16)
    options = parser.parse_args(argv)
    keep_freed_memory()
    model, site = lm.load_model(MODEL), Site.parse(options.site)
    text = pack(StdlibText(), lm.load_tokenizer(MODEL), PACKING, HELDOUT, options.tokens)
    ids, keep = torch.from_numpy(text.contexts).long(), torch.from_numpy(text.keep)
    rows_ND = run_to(model, [site], ids[: options.lm_batch])[str(site)][keep[: options.lm_batch]]
    sae = load(options.sae) if options.sae else started(rows_ND)
    mean_D = rows_ND.double().mean(0)
    score = SiteScore(Splice(model, site), [sae], mean_D, torch.float32, (len(ids), ids.shape[1]))
    whole, bare, end = measure(score, ids, keep, options.lm_batch)
    ratios = [a / b for a, b in zip(whole, bare, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ratio = (sum(whole) + end) / sum(bare)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{int(keep.sum()):,} tokens, {len(ratios)} batches of {options.lm_batch} contexts; one {sae.name}")
    print(f"evaluation {sum(whole):.1f} s + {end:.2f} s at the end, four plain forwards {sum(bare):.1f} s")
    print(f"a batch: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}; peak memory {peak:,.0f} MiB")
    print(f"ratio {ratio:.3f}; at most {GOAL} is the goal: {'met' if ratio <= GOAL else 'MISSED'}")


if __name__ == "__main__":
    main()
