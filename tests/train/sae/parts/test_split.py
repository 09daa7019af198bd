"""A dictionary split over processes trains as one process would: the same choices, losses, steps and calibrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import save as to_bytes

from tests.helpers.ranks import CASES, Case, F, connect, join, make, mesh_of, outcome, part_of_batch
from tests.helpers.slow import slow_unless
from train.sae import TrainContext
from train.sae.parts.groups import RankGroup
from train.sae.parts.init import directions
from train.sae.parts.ranks import ONE, Mesh, kth_largest, largest_over_ranks
from train.sae.parts.split import LatentSplit

MESHES = {2: [(1, 2), (2, 1)], 3: [(1, 3), (3, 1)], 4: [(2, 2)]}  # data x latents, by processes
REPLICATED = ("b_dec", "W_skip")


def _values(case: int, ranks: int) -> tuple[list[torch.Tensor], int]:
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


def _worker(rank: int, ranks: int, every: int, folder: str) -> None:
    connect(rank, ranks, folder)
    out: dict[str, Any] = {}
    for number in range(42):
        values, count = _values(number, ranks)
        place_n = sum(map(len, values[:rank])) + torch.arange(len(values[rank]))
        mesh, places = Mesh(RankGroup(ranks, rank)), sum(map(len, values))
        kept_n, smallest = largest_over_ranks(values[rank], place_n, places, count, mesh)
        kth = kth_largest(values[rank], min(count, places), mesh)
        out[f"values {number}"] = (kept_n, float(smallest), float(kth))
    for shape in MESHES[ranks]:
        mesh = mesh_of(*shape)
        for case in _cases(shape, every):
            out[f"{shape} {case}"] = outcome(case, mesh)
        out[f"{shape} by rank"] = _selected_by_rank(mesh)
    torch.save(out, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def _cases(shape: tuple[int, int], every: int) -> list[Case]:
    """Each so many-th case for a mesh: without latents over processes a GPU's sizes make no difference."""
    return [case for case in CASES[::every] if shape[1] > 1 or not case.gpu]


def _whole(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parameters of the processes put together."""
    whole = {}
    for name in parts[0]:
        if name in REPLICATED:
            assert all(torch.equal(part[name], parts[0][name]) for part in parts)
        whole[name] = parts[0][name] if name in REPLICATED else join([part[name] for part in parts])
    return whole


def _same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("ranks", "every"), slow_unless({(2, 4)}.__contains__, [(2, 4), (2, 1), (3, 1), (4, 1)]))
def test_a_mesh_trains_what_one_process_does(ranks: int, every: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (ranks, every, str(tmp_path)), nprocs=ranks)
    of_rank = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
    for number in range(42):
        _compare_choice([out[f"values {number}"] for out in of_rank], *_values(number, ranks))
    for data, latents in MESHES[ranks]:
        for row in range(data):
            alone = _selected_by_rank(ONE, RankGroup(data, row))
            parts = [out[f"{(data, latents)} by rank"] for out in of_rank[row * latents :][:latents]]
            assert torch.equal(join([part.t() for part in parts]).t(), alone)
            assert alone.sum() == BY_RANK.settings["k"] * len(alone)
    for case in CASES[::every]:
        one = outcome(case, ONE)
        assert one["selected"].any()
        for data, latents in MESHES[ranks]:
            if case not in _cases((data, latents), every):
                continue
            all_of = [out[f"{(data, latents)} {case}"] for out in of_rank]
            try:
                _compare(all_of, one, data, latents, case.steps)
            except AssertionError as error:
                raise AssertionError(f"{data} x {latents}, {case}: {error}") from error


BY_RANK = Case("batchtopk", {"k": 3, "largest_of": "rank"})


def _selected_by_rank(mesh: Mesh, rows: RankGroup | None = None) -> torch.Tensor:
    """What is selected of the rows of a rank where each selects of its own."""
    sae = make(BY_RANK, mesh.latents)
    x_BD = part_of_batch(0, BY_RANK, rows or mesh.data).x_BD
    step = sae.loss(sae.norm.normalise(x_BD), TrainContext(data=mesh.data))
    return step.codes.dense(step.codes.values) > 0


def _compare_choice(found: list[Any], values: list[torch.Tensor], count: int) -> None:
    kept, smallest = _reference(values, count)
    assert torch.equal(torch.cat([rank[0] for rank in found]), kept)
    joined = torch.cat(values).sort(descending=True).values
    kth = float(joined[min(count, len(joined)) - 1])
    assert all(rank[1:] == (smallest, kth) for rank in found)


def _compare(all_of: list[dict[str, Any]], one: dict[str, Any], data: int, latents: int, steps: int) -> None:
    parts = all_of[:latents]  # of the first data rank
    for name in ("first weights", "weights", "final"):
        for row in range(data):  # the data ranks hold the same latents, bit for bit
            for part, other in zip(parts, all_of[row * latents :][:latents], strict=False):
                assert all(torch.equal(part[name][key], other[name][key]) for key in part[name]), name
        _same(_whole([part[name] for part in parts]), one[name])
    for part in all_of:
        for step in range(steps):
            assert part[f"figures {step}"].keys() == one[f"figures {step}"].keys()
            figures, wanted = dict(part[f"figures {step}"]), dict(one[f"figures {step}"])
            assert figures.pop("l0") == pytest.approx(wanted.pop("l0"), rel=1e-6)  # always in float32
            _same(figures, wanted)
        _same(part["buffers"], one["buffers"])
        assert part["dead"] == one["dead"]
        _same(part.get("calibration"), one.get("calibration"))
        _same(part["held out"], one["held out"])
    assert torch.equal(join([part["since_F"] for part in parts]), one["since_F"])
    if data == 1:
        assert torch.equal(join([part["selected"].t() for part in parts]).t(), one["selected"])
    whole = _whole([part["final"] for part in parts]) | parts[0]["buffers_at_end"]
    whole["W_enc"] = whole.pop("W_enc_FD").t().contiguous()
    assert all(part["file"] == to_bytes(whole) for part in parts)  # of every process, as each gathers it
    assert all(part["shards"] == _shards(whole, parts[0]["shards"]) for part in parts)
    f = torch.cat([join([part["f"].t() for part in all_of[row * latents :][:latents]]).t() for row in range(data)])
    assert torch.equal(f > 0, one["f"] > 0)
    _same(f, one["f"])
    for name in ("x_hat", "decoded"):
        _same(torch.cat([all_of[row * latents][name] for row in range(data)]), one[name])


def _shards(whole: dict[str, torch.Tensor], shards: dict[range, bytes]) -> dict[range, bytes]:
    """The files that the tensors of a whole SAE are in, by the latents that each has."""
    assert len(shards) > 2 and [latent for latents in shards for latent in latents] == list(range(F))
    files = {}
    for latents in shards:
        here = slice(latents.start, latents.stop)
        tensors = {name: tensor for name, tensor in whole.items() if latents.start == 0 or F in tensor.shape}
        for name, tensor in tensors.items():
            if F in tensor.shape:
                tensors[name] = tensor[:, here].contiguous() if name == "W_enc" else tensor[here]
        files[latents] = to_bytes(tensors)
    return files


@pytest.mark.parametrize("width", [7, 4096, 8191, 8192, 8193, 20_000])
def test_the_first_rows_are_those_of_one_process(width: int) -> None:
    whole = directions(width, 5, seed=4)
    for ranks in (2, 3):
        parts = [directions(width, 5, 4, LatentSplit(ranks, rank)) for rank in range(ranks)]
        assert torch.equal(join(parts, width), whole)
