"""A batch split over ranks: the selection, loss and gradients of one process that has it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from train.sae import VARIANTS, TrainContext
from train.sae.parts.ranks import Group, Mesh, kth_largest, largest_over_ranks

D, F, TOKENS, K = 8, 24, 12, 3


def _parts(case: int, ranks: int) -> tuple[list[torch.Tensor], int]:
    """Values by rank, and how many to keep: random, all tied, ties over ranks, few positive, a rank without any."""
    generator = torch.Generator().manual_seed(case)
    dtype = torch.float64 if case % 2 else torch.float32
    values = [torch.randn(40 + rank, generator=generator, dtype=dtype) for rank in range(ranks)]
    kind = case % 7
    if kind == 1:
        values = [torch.ones_like(part) for part in values]
    if kind == 2:
        values = [(part * 2).round() / 2 for part in values]
    if kind == 3:
        values = [part - 2.5 for part in values]
    if kind == 4:
        values[-1] = -values[-1].abs()
    if kind == 5:
        values = [part * 1e-42 if dtype == torch.float32 else part * 1e-310 for part in values]  # subnormal
    if kind == 6:
        values[0] = values[0][:0]
    return values, int(torch.randint(1, 60, (), generator=generator))


def _reference(values: list[torch.Tensor], count: int) -> tuple[torch.Tensor, float]:
    """The choice of one process by a stable sort, from the rule's own words."""
    joined = torch.cat(values)
    order = sorted(range(len(joined)), key=lambda i: (-float(joined[i]), i))
    chosen = [i for i in order if joined[i] > 0][:count]
    kept = torch.zeros(len(joined), dtype=torch.bool)
    kept[chosen] = True
    return kept, float(joined[chosen[-1]]) if len(chosen) == count else 0.0


def _sae(name: str) -> Any:
    torch.manual_seed(0)
    prefixes = {"prefixes": [0.25, 1.0]} if name == "matryoshka" else {}
    sae = VARIANTS[name](D, width=F, k=K, **prefixes).double()
    sae.initialise(torch.randn(256, D, dtype=torch.float64), mean_sq_norm=float(D), variance=float(D))
    return sae


def _batch() -> torch.Tensor:
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x[7:] = x[:5]  # equal tokens on different ranks: their z tie
    return x


def _worker(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    out: dict[str, Any] = {}
    for case in range(42):
        values, count = _parts(case, ranks)
        place_n = sum(map(len, values[:rank])) + torch.arange(len(values[rank]))
        mesh = Mesh(Group(ranks, rank))
        kept_n, smallest = largest_over_ranks(values[rank], place_n, sum(map(len, values)), count, mesh)
        out[f"case {case}"] = (kept_n, float(smallest), float(kth_largest(values[rank], count, mesh)))
    for name in ("batchtopk", "matryoshka"):
        sae = _sae(name)
        step = sae.loss(_batch().chunk(ranks)[rank], TrainContext(data=Group(ranks, rank)))
        step.loss.backward()
        gradients = [parameter.grad / ranks for parameter in sae.parameters()]
        total = step.loss.detach() / ranks
        for tensor in (*gradients, total):
            dist.all_reduce(tensor)
        out[name] = (total, gradients, step.min_kept, step.fired_F, float(step.metrics["l0"]))
    torch.save(out, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_select_what_one_process_would(ranks: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (ranks, str(tmp_path)), nprocs=ranks)
    out = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for case in range(42):
        kept, smallest = _reference(*_parts(case, ranks))
        assert torch.equal(torch.cat([rank[f"case {case}"][0] for rank in out]), kept), case
        assert all(rank[f"case {case}"][1] == smallest for rank in out), case
        values, count = _parts(case, ranks)
        kth = float(torch.cat(values).sort(descending=True).values[count - 1])
        assert all(rank[f"case {case}"][2] == kth for rank in out), case
    for name in ("batchtopk", "matryoshka"):
        sae = _sae(name)
        step = sae.loss(_batch())
        step.loss.backward()
        loss, gradients, min_kept, *_ = out[0][name]
        torch.testing.assert_close(loss, step.loss.detach(), rtol=1e-13, atol=0)
        for mine, parameter in zip(gradients, sae.parameters(), strict=True):
            torch.testing.assert_close(mine, parameter.grad, rtol=1e-11, atol=1e-13)
        assert all(torch.equal(rank[name][2], step.min_kept) for rank in out) and min_kept > 0
        assert torch.equal(torch.stack([rank[name][3] for rank in out]).any(0), step.fired_F)
        assert sum(rank[name][4] for rank in out) / ranks == pytest.approx(float(step.metrics["l0"]), rel=1e-12)
        assert len({rank[name][4] for rank in out}) > 1  # the ranks' shares differ, so a choice by rank would fail
