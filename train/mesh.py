"""The processes of a run as a mesh, data x latents: each has other rows of a batch, or other latents of the dictionary.

Processes number through the latents first: with `trainer.latent_ranks` R, process p holds the latents f = p mod R, and
p .. p + R - 1 of one host read the same rows.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from data.base.errors import UserError
from train.config import TrainSettings
from train.sae.parts.groups import RankGroup
from train.sae.parts.ranks import Mesh
from train.sae.parts.split import WHOLE, LatentSplit

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

_RANK_NAMES = ("RANK", "SLURM_PROCID")
_WORLD_NAMES = ("WORLD_SIZE", "SLURM_NTASKS")


def _number(names: tuple[str, ...]) -> int | None:
    """Read a number that torchrun or Slurm gives each process."""
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def latent_split(settings: TrainSettings) -> LatentSplit:
    """Say which latents this process holds, before the processes are connected."""
    ranks = settings.trainer.latent_ranks
    if ranks == 1:
        return WHOLE
    rank, world = _number(_RANK_NAMES), _number(_WORLD_NAMES)
    if rank is None or world != settings.processes:
        started = "1 process" if world is None else f"{world} processes"
        per_node = settings.trainer.devices
        raise UserError(
            f"trainer.latent_ranks={ranks} needs {settings.processes} processes and there is {started}: start it with "
            f"torchrun --nproc-per-node {per_node} -m train trainer.devices={per_node} trainer.latent_ranks={ranks}"
        )
    return LatentSplit(ranks, rank % ranks)


def is_lost_rank(error: RuntimeError) -> bool:
    """Tell whether an error came of a message to a process that is no more."""
    import torch.distributed as dist

    # NCCL's errors have a type of their own, gloo's only their words.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def connect(trainer: Trainer, settings: TrainSettings) -> Mesh:
    """Give the mesh of the run's processes; those that hold one dictionary together are connected here."""
    split = latent_split(settings)
    if split.size == 1:  # Lightning connects them as the fit begins
        return Mesh(RankGroup(settings.world, trainer.global_rank), WHOLE)
    from torch.distributed.device_mesh import init_device_mesh

    # Before the fit, as the first weights are scaled by what the whole dictionary reconstructs.
    trainer.strategy.setup_environment()
    shape = (settings.world, split.size)
    mesh = init_device_mesh(trainer.strategy.root_device.type, shape, mesh_dim_names=("data", "latents"))
    data = RankGroup(settings.world, mesh.get_local_rank("data"), mesh.get_group("data"))
    latents = LatentSplit(split.size, split.rank, mesh.get_group("latents"))
    assert mesh.get_local_rank("latents") == split.rank
    return Mesh(data, latents)
