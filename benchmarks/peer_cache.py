"""sae-lens' CacheActivationsRunner on a local model and random tokens, for benchmarks/harvest.py.

Run by the interpreter that has sae-lens, with nothing of this project. Says `ready` once the model is loaded; then, for
each line on its input, caches `--tokens` tokens in a new folder and prints the seconds that took.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--hook", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    for name in ("width", "vocabulary", "context", "batch", "tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()

    import numpy as np
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    ids = np.random.default_rng(0).integers(
        3, options.vocabulary, (2 * options.tokens // options.context, options.context)
    )
    config = CacheActivationsRunnerConfig(
        dataset_path="random",
        model_name=options.model,
        model_class_name="AutoModelForCausalLM",
        model_batch_size=options.batch,
        hook_name=options.hook,
        d_in=options.width,
        training_tokens=options.tokens,
        context_size=options.context,
        new_cached_activations_path=str(options.folder / "0"),
        shuffle=False,
        device="cpu",
        buffer_size_gb=options.tokens * options.width * 4 / 1e9,  # one shard
        prepend_bos=False,
        streaming=False,
    )
    runner = CacheActivationsRunner(config, override_dataset=Dataset.from_dict({"input_ids": ids.tolist()}))
    print("ready", flush=True)
    for turn, _ in enumerate(sys.stdin):
        folder = options.folder / str(turn)
        runner.cfg.new_cached_activations_path = str(folder)
        began = time.perf_counter()
        runner.run()
        print(time.perf_counter() - began, flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
