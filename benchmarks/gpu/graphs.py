"""Steps by CUDA graphs beside steps without: one JSON line each for weights and time.

    python -m benchmarks.gpu.graphs --variant batchtopk --width 12288
    python -m benchmarks.gpu.graphs --device cpu --width 256 --d-model 32 --batch 64    # with stand-ins

The weights of both are those after the same batches. Letters: B tokens, D model width, F latents.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from benchmarks.counting import Shape, trainer_of
from benchmarks.gpu.pieces import timed
from benchmarks.recorded_graph import RecordedGraph
from benchmarks.stand_in import StandIn
from train.cuda_graph import CudaGraph
from train.sae.sparse.backend import use_backend
from train.sae_trainer import SAETrainer


def batches(args: argparse.Namespace) -> Iterator[Tensor]:
    """Draw the same batches each time."""
    for seed in range(args.steps):
        drawn = torch.randn(args.batch, args.d_model, generator=torch.Generator().manual_seed(seed))
        yield drawn.to(args.device)


def trained(args: argparse.Namespace, by_graphs: bool) -> SAETrainer:
    """Make a trainer and take the steps."""
    torch.manual_seed(0)
    trainer = trainer_of(Shape(args.variant, args.width, args.d_model, args.batch, args.k, ema=True))
    trainer.to(args.device)
    trainer.begin(torch.device(args.device))
    if by_graphs:
        trainer.use_graphs(CudaGraph if args.device == "cuda" else RecordedGraph)
    for x_BD in batches(args):
        trainer.training_step(x_BD)
    return trainer


def apart(one: SAETrainer, other: SAETrainer) -> float:
    """Compute the largest difference of two SAEs' weights."""
    pairs = zip(one.sae.parameters(), other.sae.parameters(), strict=True)
    return max(float((left - right).detach().abs().max()) for left, right in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variant", choices=("topk", "batchtopk", "matryoshka"), default="batchtopk")
    parser.add_argument("--width", type=int, default=12_288)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    path: AbstractContextManager[None] = nullcontext() if args.device == "cuda" else use_backend(StandIn())
    with path:
        plain, again, graphed = trained(args, False), trained(args, False), trained(args, True)
        name = f"{args.variant} F={args.width:,}"
        line = {"name": f"{name}: weights by graphs and without differ by at most", "reading": apart(plain, graphed)}
        print(json.dumps(line | {"expected": 0.0, "two_plain_runs": apart(plain, again)}), flush=True)
        x_BD = next(batches(args))
        ms = [timed(lambda t=t: t.training_step(x_BD), args.device, args.steps) for t in (graphed, plain)]  # type: ignore[misc]
        print(json.dumps({"name": f"{name}, ms a step by graphs", "reading": ms[0], "of_plain": ms[0] / ms[1]}))


if __name__ == "__main__":
    main()
