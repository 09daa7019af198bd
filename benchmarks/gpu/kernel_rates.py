"""What the step's kernels take, each beside the bytes it must move: one JSON line a reading.

    python -m benchmarks.gpu.kernel_rates --width 262144
    python -m benchmarks.gpu.kernel_rates --device cpu --width 256 --d-model 32 --batch 64 --k 4    # interpreted

Letters: B tokens, D model width, F latents, n = k B entries.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.pieces import timed
from benchmarks.gpu.predictions import MEMORY_BYTES, TF32_FLOPS
from train.sae import VARIANTS
from train.sae.parts.update import update
from train.sae.sparse.above import blocks_of, room_for
from train.sae.sparse.backend import Backend, use_backend
from train.sae.sparse.codes import Support
from train.sae.sparse.cpu import CPUBackend
from train.sae.sparse.error import squared_error
from train.sae.sparse.product import Product
from train.sae.sparse.rules import Selection, TopOfBatch
from train.sae.sparse.triton import TritonBackend


def updater(args: argparse.Namespace, backend: Backend) -> Callable[[], None]:
    """Make an update of an SAE by gradients that do not change, as `backend` computes it."""
    sae = VARIANTS["batchtopk"](args.d_model, args.width, k=args.k).to(args.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-9, fused=True)
    grads = [torch.randn_like(parameter) for parameter in sae.parameters()]

    def act() -> None:
        # The plain order writes into its gradients, which are projected and clipped the second time: as much work.
        for parameter, grad in zip(sae.parameters(), grads, strict=True):
            parameter.grad = grad
        with use_backend(backend):
            update(sae, optimizer, 1.0)

    return act


def updates(args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Time the fused update beside the plain order of the same."""
    fused, plain = (timed(updater(args, each), args.device, repeats) for each in (TritonBackend(), CPUBackend()))
    expected = 68 * args.width * args.d_model / MEMORY_BYTES * 1e3
    return {"name": f"update F={args.width:,}, ms", "reading": fused, "expected": expected, "of_plain": fused / plain}


def support_of(args: argparse.Namespace, frequent: bool) -> Support:
    """Make k entries a token in ascending order; with `frequent` latent 0 is active on every other token."""
    generator = torch.Generator().manual_seed(0)
    span = (args.width - 1) // args.k
    steps_Bk = torch.randint(0, span, (args.batch, args.k), generator=generator)
    latents_Bk = 1 + span * torch.arange(args.k) + steps_Bk
    if frequent:
        latents_Bk[::2, 0] = 0
    rows_n = torch.arange(args.batch).repeat_interleave(args.k)
    return Support(rows_n.to(args.device), latents_Bk.reshape(-1).to(args.device), (args.batch, args.width))


def sums(args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Time one matrix's gradient with a latent that is active on half of all tokens, beside one without."""
    values, x = torch.rand(args.batch * args.k, device=args.device), _rows(args, args.batch)
    took = []
    for frequent in (True, False):
        support = support_of(args, frequent)
        took.append(timed(lambda support=support: support.latent_sums(values, x), args.device, repeats))  # type: ignore[misc]
    expected = 4 * args.d_model * (args.batch * args.k + args.width) / MEMORY_BYTES * 1e3
    name = f"gradient of a matrix, a latent on half of all tokens, F={args.width:,}, ms"
    return {"name": name, "reading": took[0], "expected": expected, "of_even": took[0] / took[1]}


def errors(args: argparse.Namespace, repeats: int, prefixes: int = 1) -> dict[str, Any]:
    """Time the reconstructions' errors with their losses and dots."""
    support, values = support_of(args, False), torch.rand(args.batch * args.k, device=args.device)
    W_dec_FD, target_BD, base_D = _rows(args, args.width), _rows(args, args.batch), _rows(args, 1)[0]
    bounds = [-(-args.width * prefix // prefixes) for prefix in range(1, prefixes + 1)]
    ms = timed(lambda: squared_error(values, W_dec_FD, base_D, target_BD, support, bounds=bounds), args.device, repeats)
    expected = 4 * args.d_model * (args.batch * args.k + (1 + prefixes) * args.batch) / MEMORY_BYTES * 1e3
    of = "" if prefixes == 1 else f" of {prefixes} prefixes"
    return {"name": f"error, loss and dots{of}, F={args.width:,}, ms", "reading": ms, "expected": expected}


def packing(args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Time the packing of what lies above a bound, of which 3 k entries a token are, of a block of z."""
    backend = TritonBackend()
    width = min(args.width, backend.block_entries // args.batch)
    z_BF = torch.randn(args.batch, width, device=args.device)
    share = min(0.5, 3 * args.k / args.width)
    bound = torch.special.ndtri(torch.tensor(1 - share, device=args.device))
    (block,) = blocks_of(range(0, width, width), width)
    packed = room_for(z_BF.numel(), [block], z_BF)

    def act() -> None:
        packed.found.zero_()
        backend.pack_above(z_BF, bound, block, packed)

    ms = timed(act, args.device, repeats)
    expected = 4 * z_BF.numel() / MEMORY_BYTES * 1e3
    return {"name": f"packing above a bound, F={width:,} of {args.width:,}, ms", "reading": ms, "expected": expected}


def choices(args: argparse.Namespace, repeats: int) -> dict[str, Any]:
    """Time BatchTopK's choice without z beside the one from z, each with its product."""
    product = Product(_rows(args, args.batch), _rows(args, args.width), None)
    selection = Selection(TopOfBatch(args.k * args.batch))
    took = []
    for backend in (TritonBackend(candidates_from=0), TritonBackend()):
        took.append(timed(lambda backend=backend: backend.select(product, [selection]), args.device, repeats))  # type: ignore[misc]
    expected = 2e3 * args.batch * args.d_model * args.width / TF32_FLOPS
    name = f"product and choice without z, F={args.width:,}, ms"
    return {"name": name, "reading": took[0], "expected": expected, "of_choice_from_z": took[0] / took[1]}


def _rows(args: argparse.Namespace, rows: int) -> Tensor:
    return torch.randn(rows, args.d_model, device=args.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=12_288)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    repeats = 10
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        repeats = 1  # nothing that is timed there says anything of a card
    with use_backend(TritonBackend()):
        for measure in (updates, sums, errors, partial(errors, prefixes=5), packing, choices):
            print(json.dumps(measure(args, repeats)), flush=True)


if __name__ == "__main__":
    main()
