"""In the peers' environment: train SAEs of another library on given batches, and save them in its own format.

    .venv-peers/bin/python -m benchmarks.contestants.train_peer < jobs.json

jobs.json is a list of jobs (`Job`); each ends with a line of JSON on stdout, {"out": its folder, "seconds": ...}.
Batches are rows in the model's own units, [steps, B, D] float32 in a .npy file, taken once, in order. Each library
gets them scaled as its own `fit` scales them, and its own defaults but for what depends on the length of the run:
its warm-ups are cut to a tenth of the run, its decay starts at four fifths.

Where a library sets sparsity by a coefficient alone (ReLU and Gated in both, JumpReLU in sae_lens) a job trains up to
six times, the coefficient corrected by the L0 that came out, until that is within 3% of k; the nearest is saved.

Letters: B tokens in a batch, D model width, F latents.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contestants.spec import PREFIXES, SELECTING

LIBRARIES = ("dictionary_learning", "sae_lens")
PENALTY = "penalty.json"  # in a job's folder, where its L0 comes from a coefficient

_FIRST = {  # the coefficients a search begins at: the libraries' own defaults
    ("dictionary_learning", "relu"): 0.1,
    ("dictionary_learning", "gated"): 0.1,
    ("sae_lens", "relu"): 1.0,
    ("sae_lens", "gated"): 1.0,
    ("sae_lens", "jumprelu"): 1.0,
}
_TRIES, _NEAR = 6, 0.03  # trainings of a search; the distance of L0 from k, over k, that ends it
_LAST_BATCHES = 8  # that L0 is measured on
_WARMUP, _DECAY = 0.1, 0.8  # shares of the run


@dataclass(frozen=True)
class Job:
    """A training; out: the folder to write."""

    library: str
    variant: str
    batches: str
    width: int
    k: int
    lr: float
    seed: int
    out: str
    penalty: float | None = None
    """Where the search for the coefficient begins; None: at the library's default."""


@dataclass(frozen=True)
class Trained:
    """What a training gave: the mean L0 on its last batches, and how to save it into a folder."""

    l0: float
    save: Callable[[Path], None]


def dictionary_learning(job: Job, batches: Any, penalty: float | None) -> Trained:
    """Train by the library's trainer, as its `trainSAE` does with `normalize_activations`: unit mean squared norm."""
    from benchmarks.contestants import dictionary_learning as contestant

    trainer_class = contestant.TRAINERS[job.variant]
    # The same gradient without the einsum that takes most of its time on a CPU.
    home = sys.modules[trainer_class.__module__]
    home.remove_gradient_parallel_to_decoder_directions = contestant.elementwise  # type: ignore[attr-defined]
    steps, _, d_model = batches.shape
    settings: dict[str, Any] = {}
    if job.variant in SELECTING:
        settings |= {"k": job.k, "threshold_start_step": round(_WARMUP * steps)}
    else:
        settings["sparsity_warmup_steps"] = round(_WARMUP * steps)
    if job.variant == "jumprelu":
        settings["target_l0"] = job.k
    if penalty is not None:
        settings["l1_penalty"] = penalty
    if job.variant == "matryoshka":
        settings["group_fractions"] = [end - start for start, end in pairwise((0.0, *PREFIXES))]
    trainer = trainer_class(
        steps=steps,
        activation_dim=d_model,
        dict_size=job.width,
        layer=0,
        lm_name="none",
        lr=job.lr,
        warmup_steps=round(_WARMUP * steps),
        decay_start=round(_DECAY * steps),
        seed=job.seed,
        device="cpu",
        **settings,
    )
    norm = mean_square(batches) ** 0.5
    for step, x_BD in enumerate(tensors(batches)):
        trainer.update(step, x_BD / norm)
    l0 = mean_l0(trainer.ae.encode, batches, 1 / norm)
    trainer.ae.scale_biases(norm)

    def save(out: Path) -> None:
        out.mkdir(parents=True)
        torch.save(trainer.ae.state_dict(), out / "ae.pt")
        (out / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))

    return Trained(l0, save)


def sae_lens(job: Job, batches: Any, penalty: float | None) -> Trained:
    """Train by the library's SAETrainer, with activations scaled to a mean squared norm of D."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from benchmarks.contestants import sae_lens as contestant
    from benchmarks.contestants.spec import Spec

    torch.manual_seed(job.seed)
    steps, batch, d_model = batches.shape
    settings: dict[str, Any] = {}
    if penalty is not None:
        norm = "l0" if job.variant == "jumprelu" else "l1"
        settings = {f"{norm}_coefficient": penalty, f"{norm}_warm_up_steps": round(_WARMUP * steps)}
    sae = contestant.build(Spec(job.variant, d_model, job.width, job.k, batch), sparse=False, **settings)
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=job.lr,
        lr_end=job.lr / 10,  # as its runner's configuration sets it
        lr_warm_up_steps=round(_WARMUP * steps),
        lr_decay_steps=round((1 - _DECAY) * steps),
        # As many tokens as ours at most: a window longer than the run would never call a latent dead.
        dead_feature_window=max(1, steps // 10),
    )
    scale = (d_model / mean_square(batches)) ** 0.5
    trainer = SAETrainer(config, sae, (x_BD * scale for x_BD in tensors(batches)))
    trainer.fit()
    l0 = mean_l0(sae.encode, batches, scale)
    sae.fold_activation_norm_scaling_factor(scale)
    return Trained(l0, lambda out: sae.save_inference_model(str(out)))


@torch.no_grad()
def mean_l0(encode: Callable[[Tensor], Tensor], batches: Any, scale: float) -> float:
    """Measure the mean L0 on the last batches."""
    counts = [(encode(x_BD * scale) != 0).sum(1).float().mean() for x_BD in tensors(batches[-_LAST_BATCHES:])]
    return float(torch.stack(counts).mean())


def train(job: Job, library: Callable[[Job, Any, float | None], Trained], batches: Any) -> None:
    """Train and save a job, by a search for the coefficient where L0 comes from one."""
    first = _FIRST.get((job.library, job.variant))
    if first is None:
        library(job, batches, None).save(Path(job.out))
        return
    tried: list[tuple[float, Trained]] = []
    penalty = first if job.penalty is None else job.penalty
    for _ in range(_TRIES):
        tried.append((penalty, library(job, batches, penalty)))
        if abs(tried[-1][1].l0 / job.k - 1) < _NEAR:
            break
        penalty = next_penalty([(one, trained.l0) for one, trained in tried], job.k)
    penalty, best = min(tried, key=lambda one: abs(math.log(max(one[1].l0, 1e-3) / job.k)))
    best.save(Path(job.out))
    (Path(job.out) / PENALTY).write_text(json.dumps({"penalty": penalty, "l0": best.l0}))


def next_penalty(tried: list[tuple[float, float]], k: float) -> float:
    """Choose the next coefficient from those tried and their L0s, the last one at most eight times up or down.

    log L0 is taken as linear in the coefficient's logarithm, through the two whose L0 is nearest k; of one, as falling
    like 1 / coefficient.
    """
    points = [(math.log(penalty), math.log(max(l0, 1e-3) / k)) for penalty, l0 in tried]
    near = sorted(points, key=lambda point: abs(point[1]))
    slope = -1.0
    if len(near) > 1 and near[0][0] != near[1][0]:
        slope = min(-0.2, (near[0][1] - near[1][1]) / (near[0][0] - near[1][0]))
    step = max(-math.log(8), min(math.log(8), -near[0][1] / slope))
    return math.exp(near[0][0] + step)


def tensors(batches: Any) -> Iterator[Tensor]:
    for x_BD in batches:
        yield torch.from_numpy(np.array(x_BD))


def mean_square(batches: Any) -> float:
    """Return the mean squared norm of a row, from the first batches."""
    return float(np.square(np.asarray(batches[:64], np.float64)).sum(-1).mean())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    for fields in json.load(sys.stdin):
        job = Job(**fields)
        began = time.perf_counter()
        library = {"dictionary_learning": dictionary_learning, "sae_lens": sae_lens}[job.library]
        train(job, library, np.load(job.batches, mmap_mode="r"))
        answer = {"out": job.out, "seconds": time.perf_counter() - began}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
