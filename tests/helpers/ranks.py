"""SAEs trained by several processes and by one: the same cases, and what must come out alike."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.optimizers import OPTIMIZERS
from train.sae import SAE, VARIANTS, Batch, StartRows, TrainContext
from train.sae.metrics import held_out
from train.sae.parts.groups import RankGroup
from train.sae.parts.ranks import Mesh
from train.sae.parts.split import WHOLE, LatentSplit
from train.sae.sparse.backend import use_backend
from train.sae.sparse.triton import TritonBackend
from train.sae.variants.batchtopk import BatchTopKBase
from train.sae.weights_file import weight_pieces
from train.sae_trainer import SAETrainer
from train.schedules import Schedule

D, E, F, TOKENS, STEPS = 8, 6, 23, 12, 5  # neither 2 nor 3 divides F


@dataclass(frozen=True)
class Case:
    """A variant's settings, and what is special about its weights."""

    variant: str
    settings: dict[str, Any] = field(default_factory=dict)
    dead: str = "some"
    """Latents that are dead at the start: none, some (a third), all, or even (of two processes those of one)."""
    tied: bool = False
    """Whether neighbouring latents are alike, so that their z tie over the processes."""
    silent: int | None = None
    """The process, of two, whose latents never fire."""
    gpu: bool = False
    """Whether the sizes are those of a GPU, in Triton's interpreter."""
    ema: float | None = None

    @property
    def steps(self) -> int:
        """Steps it is trained for; Triton's interpreter is slow."""
        return 1 if self.gpu else STEPS

    def __str__(self) -> str:
        parts = [self.variant, *(f"{name}={value}" for name, value in self.settings.items()), f"dead={self.dead}"]
        marks = {"tied": self.tied, f"silent={self.silent}": self.silent is not None, "gpu": self.gpu}
        return " ".join(parts + [name for name, marked in marks.items() if marked])


_TOPK = {"topk": {"k": 3}, "batchtopk": {"k": 3}, "matryoshka": {"k": 3, "prefixes": [0.05, 0.3, 1.0]}}

CASES = [
    Case("relu", {"sparsity": 0.1, "form": "april"}),
    Case("relu", {"sparsity": 0.1, "form": "bricken", "target_l0": 4}, silent=1),
    Case("gated", {"sparsity": 0.1, "target_l0": 4}, ema=0.9),
    Case("gated", {"sparsity": 0.1}, silent=0),
    Case("jumprelu", {"target_l0": 4, "bandwidth": 0.4}),
    Case("jumprelu", {"sparsity": 0.1, "bandwidth": 0.4, "initial_threshold": 0.1}, tied=True),
    *(Case(name, settings, tied=True) for name, settings in _TOPK.items()),
    *(Case(name, settings, dead="none", silent=1) for name, settings in _TOPK.items()),
    *(Case(name, settings, dead="all", ema=0.9) for name, settings in _TOPK.items()),
    *(Case(name, {**settings, "auxk_k": 1, "auxk_relu": True}, dead="even") for name, settings in _TOPK.items()),
    Case("topk", {"k": 2, "multi_topk": True}, tied=True),
    Case("batchtopk", {"k": 3, "d_out": E, "skip": True}),
    Case("gated", {"sparsity": 0.1, "d_out": E}),
    Case("topk", {"k": 9, "auxk_k": 1}, dead="all", tied=True),
    Case("batchtopk", {"k": 9, "auxk_norm": "variance"}, tied=True),
    *(Case(name, settings, tied=True, gpu=True) for name, settings in _TOPK.items()),
    Case("topk", {"k": 2, "multi_topk": True}, dead="even", gpu=True),
    Case("jumprelu", {"target_l0": 4, "bandwidth": 0.4}, gpu=True),
]


def make(case: Case, split: LatentSplit = WHOLE) -> SAE:
    """The SAE of a case, in float64, started from samples."""
    sae = VARIANTS[case.variant](D, width=F, split=split, **case.settings).double()
    sample = torch.randn(256, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = StartRows(sample[:, :E] ** 2) if sae.transcodes else None
    sae.initialise(sample, mean_sq_norm=float(D), variance=float(D), seed=3, target=target)
    latents = split.latent(torch.arange(sae.own_width))
    with torch.no_grad():
        if case.tied:  # latents 3i, 3i + 1, 3i + 2 get the encoder row of 3i, scaled so that z falls on a grid
            whole = VARIANTS[case.variant](D, width=F, **case.settings).double()
            sae.W_enc_FD.copy_(whole.W_enc_FD[latents // 3 * 3])
        if case.silent is not None:
            sae.bias_F.masked_fill_(latents % 2 == case.silent, -50.0)
    return sae


def trainer_of(case: Case, mesh: Mesh) -> SAETrainer:
    """What trains it, for five steps, on this process of a mesh."""
    sae = make(case, mesh.latents)
    member = SAETrainer(
        sae,
        lambda groups: OPTIMIZERS["adam"](groups, lr=0.01, betas=(0.9, 0.99), eps=1e-6),
        Schedule.of_shares(STEPS, 0.2, 0.2, 0.2),
        folder=Path("nowhere"),
        name="case",
        seed=0,
        dead_after=1000,
        clip=0.05,
        ema=case.ema,
        log_every=1,
        data=mesh.data,
    )
    latents = mesh.latents.latent(torch.arange(sae.own_width))
    dead = {"none": latents < 0, "some": latents % 3 == 0, "all": latents >= 0, "even": latents % 2 == 0}[case.dead]
    member.dead.since_F.masked_fill_(dead, 1000)
    member.begin(torch.device("cpu"))
    return member


def part_of_batch(step: int, case: Case, data: RankGroup) -> Batch:
    """This rank's part of a step's batch, some of whose tokens are alike."""
    x = torch.randn(TOKENS, D, dtype=torch.float64, generator=torch.Generator().manual_seed(50 + step))
    x[-4:] = x[:4]
    x = x.chunk(data.size)[data.rank]
    return Batch(x, x[:, :E] ** 2 if "d_out" in case.settings else None)


def outcome(case: Case, mesh: Mesh) -> dict[str, Any]:
    """Everything that must not depend on how many processes there are; tensors with a row a latent are this part's."""
    member = trainer_of(case, mesh)
    sae, out = member.sae, {}
    out["first weights"] = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    with use_backend(TritonBackend()) if case.gpu else nullcontext():
        for step in range(case.steps):
            member.training_step(*part_of_batch(step, case, mesh.data))
            out[f"figures {step}"] = member.figures_logged
        x, target = part_of_batch(STEPS, case, mesh.data)
        target = None if target is None else sae.norm_out.normalise(target)
        loss = sae.loss(sae.norm.normalise(x), TrainContext(target_BE=target))
        out["selected"] = (loss.codes.dense(loss.codes.values) > 0) if mesh.data.size == 1 else None
        f, x_hat = sae.encode_decode(x)
        out["f"], out["x_hat"] = f, x_hat
        out["decoded"] = sae.decode(f, x)
    out["weights"] = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    out["buffers"] = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    out["since_F"] = member.dead.since_F
    out["dead"] = member.dead_count()
    member.copy_to()
    reserved = [part_of_batch(10 + i, case, mesh.data) for i in range(3)]
    rows = [batch.x_BD for batch in reserved]
    if isinstance(sae, BatchTopKBase):
        out["calibration"] = vars(sae.calibrate(rows, mesh.data))
    elif (level := sae.calibrate_l0(rows, mesh.data)) is not None:
        out["calibration"] = vars(level)
    (out["held out"],) = held_out([sae], reserved, torch.device("cpu"), mesh.data)
    out["buffers_at_end"] = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    out["file"] = b"".join(weight_pieces(sae, entries=40))
    shards = [range(first, min(first + 5, F)) for first in range(0, F, 5)]  # 5 is divided by no number of processes
    out["shards"] = {latents: b"".join(weight_pieces(sae, latents, entries=40)) for latents in shards}
    out["final"] = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    return out


def connect(rank: int, ranks: int, folder: str) -> None:
    """Join the processes of a test, over gloo."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)


def mesh_of(data: int, latents: int) -> Mesh:
    """The mesh of all processes of the test, `data` x `latents` of them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (data, latents), mesh_dim_names=("data", "latents"))
    groups = [(mesh.size(i), mesh.get_local_rank(i), mesh.get_group(i)) for i in range(2)]
    return Mesh(RankGroup(*groups[0]), LatentSplit(*groups[1]))


def join(parts: list[Tensor], width: int = F) -> Tensor:
    """Put the rows of the processes' latents together, process r having r, r + R, ... of `width`."""
    whole = parts[0].new_empty(width, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole
