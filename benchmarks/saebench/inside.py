"""In SAEBench's environment: its evaluations of SAEs that were exported to SAELens' format.

    .venv-saebench/bin/python -m benchmarks.saebench.inside job.json

The job says what to do (run.py writes it). `core` is SAEBench's own function on contexts that the job brings, of a
language model in a local folder; the other evaluations are called as SAEBench's authors call them, and take their data
and the model from the hub.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import multiple_evals, run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.contestants.contexts import Contexts


def load_model(job: dict[str, Any]) -> Any:
    """Open the model as TransformerLens wraps one of transformers, its numbers as they are."""
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    return TransformerBridge.boot_transformers(
        job["model"], hf_model=model.to(job["device"]), tokenizer=tokenizer, dtype=dtype, device=job["device"]
    )


@torch.no_grad()
def core(job: dict[str, Any], saes: list[tuple[str, Any]]) -> dict[str, Any]:
    """Run SAEBench's core evaluation on the job's contexts: for each SAE its figures, flat."""
    model, batch = load_model(job), job["batch"]
    ids_BT = load_file(job["ids"])["ids"].to(job["device"])
    batches = len(ids_BT) // batch
    settings = CoreEvalConfig(
        batch_size_prompts=batch,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        exclude_special_tokens_from_reconstruction=True,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    figures = {}
    for name, sae in saes:
        store: Any = Contexts(ids_BT, batch)
        groups, _ = run_evals(
            sae.to(getattr(torch, job["dtype"])), store, model, settings, ignore_tokens=set(job["special"])
        )
        figures[name] = {metric: value for group in groups.values() for metric, value in group.items()}
    return figures


def core_openwebtext(job: dict[str, Any], saes: list[tuple[str, Any]], out: str) -> None:
    """Run the core evaluation as SAEBench publishes it: its text, contexts of 128 tokens, its numbers of batches."""
    multiple_evals(
        selected_saes=saes,
        n_eval_reconstruction_batches=200,
        n_eval_sparsity_variance_batches=2000,
        eval_batch_size_prompts=16,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
        dataset="Skylion007/openwebtext",
        context_size=128,
        output_folder=out,
        dtype=job["dtype"],
        device=job["device"],
    )


def settings_of(name: str, job: dict[str, Any]) -> tuple[Any, Any]:
    """Return an evaluation's module and its settings: SAEBench's own but for model, batch, dtype and seed."""
    shared = {"model_name": job["model_name"], "random_seed": job["seed"], "llm_batch_size": job["batch"]}
    shared["llm_dtype"] = job["dtype"]
    if name in ("scr", "tpp"):
        from sae_bench.evals.scr_and_tpp import main as scr_and_tpp

        return scr_and_tpp, scr_and_tpp.ScrAndTppEvalConfig(**shared, perform_scr=name == "scr")
    if name == "sparse_probing":
        from sae_bench.evals.sparse_probing import main as sparse_probing

        return sparse_probing, sparse_probing.SparseProbingEvalConfig(**shared)
    from sae_bench.evals.absorption import main as absorption

    return absorption, absorption.AbsorptionEvalConfig(**shared)


def main() -> None:
    """Do a job: {"saes": [{"name", "folder"}], "evals", "device", "dtype", "batch", "out", "to", ...}."""
    warnings.simplefilter("ignore")
    job = json.loads(Path(sys.argv[1]).read_text())
    saes: list[tuple[str, Any]] = []
    for one in job["saes"]:
        loaded = load_and_format_sae(
            one["name"], SAE.load_from_disk(one["folder"], device=job["device"]), job["device"]
        )
        assert loaded is not None
        saes.append((one["name"], loaded[1]))
    for name in job["evals"]:
        out = str(Path(job["out"]) / name)
        if name == "core":
            Path(job["to"]).write_text(json.dumps(core(job, saes)))
        elif name == "core_openwebtext":
            core_openwebtext(job, saes, out)
        else:
            module, settings = settings_of(name, job)
            module.run_eval(settings, saes, job["device"], out)


if __name__ == "__main__":
    main()
