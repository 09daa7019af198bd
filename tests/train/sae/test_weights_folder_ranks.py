"""The final folder of a dictionary split over processes: the bytes of one process, and what a killed one leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from data.base.errors import UserError
from tests.helpers.ranks import connect, mesh_of
from train.mesh import is_lost_rank
from train.sae import SAE, VARIANTS, load, save
from train.sae.parts.split import WHOLE, LatentSplit
from train.sae.weights_file import shard_latents, weight_pieces

D, F, MOST = 8, 53, 700  # a few latents a file; neither 2 nor 3 divides F


def numbered(variant: str, split: LatentSplit = WHOLE) -> SAE:
    """An SAE whose weights are the same whoever has them; biases are told by their latent's number."""
    sae = VARIANTS[variant](D, width=F, split=split, sparsity=0.1)
    with torch.no_grad():
        for name in sae.bias_names:
            sae.get_parameter(name).copy_(split.latent(torch.arange(sae.own_width)))
        sae.b_dec.copy_(torch.arange(D))
    return sae


def _saves(rank: int, ranks: int, folder: str) -> None:
    connect(rank, ranks, folder)
    split = mesh_of(1, ranks).latents
    place = Path(folder)
    for variant in ("gated", "jumprelu"):
        sae = numbered(variant, split)
        save(sae, place / variant, {"site": "x"}, shard_bytes=MOST)
        dist.barrier()
        own = load(place / variant, split)
        assert all(torch.equal(own.state_dict()[name], value) for name, value in sae.state_dict().items())
        save(own, place / f"{variant} again", {"site": "x"})
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_folder_is_that_of_one_process(ranks: int, tmp_path: Path) -> None:
    """Every file, in shards; and what is read by rank and saved again in one file."""
    torch.multiprocessing.spawn(_saves, (ranks, str(tmp_path)), nprocs=ranks)
    for variant in ("gated", "jumprelu"):
        save(numbered(variant), tmp_path / "one", {"site": "x"}, shard_bytes=MOST)
        of_one, of_all = (
            {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", variant)
        )
        assert of_one == of_all and len(of_one) > 5
        save(numbered(variant), tmp_path / "whole", {"site": "x"})
        again = tmp_path / f"{variant} again" / "sae.safetensors"
        assert again.read_bytes() == (tmp_path / "whole" / "sae.safetensors").read_bytes()


def _is_killed(rank: int, folder: str, killed: int) -> None:
    """Save with two processes, of which one is killed as the second of several files is written."""
    connect(rank, 2, folder)
    sae, place = numbered("gated", mesh_of(1, 2).latents), Path(folder) / "sae"
    if rank == killed == 1:
        for number, _ in enumerate(weight_pieces(sae, shard_latents(sae, MOST)[0])):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
    if rank == killed == 0:
        replace, done = os.replace, list[Any]()

        def second(*paths: Any) -> None:
            if done:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(paths)
            replace(*paths)

        os.replace = second  # type: ignore[assignment]
    try:
        save(sae, place, {"site": "x"}, shard_bytes=MOST)
    except RuntimeError as error:
        assert is_lost_rank(error)
        (Path(folder) / "refused").touch()
        # gloo's threads may still wait for the one that was lost, and end a usual exit with an abort.
        os.kill(os.getpid(), signal.SIGKILL)


def _run(target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Run two processes to their ends; their exit codes."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_killed_while_the_folder_is_written_leaves_none(killed: int, tmp_path: Path) -> None:
    save(numbered("jumprelu"), tmp_path / "sae", {"site": "x"})  # an SAE that was there
    assert _run(_is_killed, str(tmp_path), killed) == [-signal.SIGKILL, -signal.SIGKILL]
    assert (tmp_path / "refused").exists()  # the other one was not left waiting
    with pytest.raises(UserError, match="holds no trained SAE"):
        load(tmp_path / "sae")
    save(numbered("gated"), tmp_path / "sae", {"site": "x"}, shard_bytes=MOST)
    assert load(tmp_path / "sae").name == "gated" and not list((tmp_path / "sae").glob(".*"))
