"""In the peers' environment: train SAEs of another library on given batches, and save them in its own format.

    .venv-peers/bin/python -m benchmarks.contestants.train_peer < jobs.json

jobs.json is a list of jobs (`Job`); each ends with a line of JSON on stdout, {"out": its folder, "seconds": ...}.
Batches are rows in the model's own units, [steps, B, D] float32 in a .npy file, taken once, in order. Each library
gets them scaled as its own `fit` scales them, and its own defaults but for what depends on the length of the run:
its warm-ups are cut to a tenth of the run, its decay starts at four fifths.

Letters: B tokens in a batch, D model width.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contestants.spec import PREFIXES

LIBRARIES = ("dictionary_learning", "sae_lens")
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


def dictionary_learning(job: Job, batches: Any) -> None:
    """Train by the library's trainer, as its `trainSAE` does with `normalize_activations`: unit mean squared norm."""
    from benchmarks.contestants import dictionary_learning as contestant

    trainer_class = contestant.TRAINERS[job.variant]
    # The same gradient without the einsum that takes most of its time on a CPU.
    home = sys.modules[trainer_class.__module__]
    home.remove_gradient_parallel_to_decoder_directions = contestant.elementwise  # type: ignore[attr-defined]
    steps, _, d_model = batches.shape
    settings: dict[str, Any] = {}
    if job.variant == "matryoshka":
        settings["group_fractions"] = [end - start for start, end in pairwise((0.0, *PREFIXES))]
    trainer = trainer_class(
        steps=steps,
        activation_dim=d_model,
        dict_size=job.width,
        k=job.k,
        layer=0,
        lm_name="none",
        lr=job.lr,
        warmup_steps=round(_WARMUP * steps),
        decay_start=round(_DECAY * steps),
        threshold_start_step=round(_WARMUP * steps),
        seed=job.seed,
        device="cpu",
        **settings,
    )
    norm = mean_square(batches) ** 0.5
    for step, x_BD in enumerate(tensors(batches)):
        trainer.update(step, x_BD / norm)
    trainer.ae.scale_biases(norm)
    out = Path(job.out)
    out.mkdir(parents=True)
    torch.save(trainer.ae.state_dict(), out / "ae.pt")
    (out / "config.json").write_text(json.dumps({"trainer": trainer.config}, default=str))


def sae_lens(job: Job, batches: Any) -> None:
    """Train by the library's SAETrainer, with activations scaled to a mean squared norm of D."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from benchmarks.contestants import sae_lens as contestant
    from benchmarks.contestants.spec import Spec

    torch.manual_seed(job.seed)
    steps, batch, d_model = batches.shape
    sae = contestant.build(Spec(job.variant, d_model, job.width, job.k, batch), sparse=False)
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
    sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(job.out)


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
        {"dictionary_learning": dictionary_learning, "sae_lens": sae_lens}[job.library](
            job, np.load(job.batches, mmap_mode="r")
        )
        answer = {"out": job.out, "seconds": time.perf_counter() - began}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
