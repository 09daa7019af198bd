"""In the peers' environment: what sae_lens' and dictionary_learning's own evaluations say of exported folders.

    .venv-peers/bin/python -m benchmarks.peer_scores < job.json

job.json: {"model": the folder of a GPT-2 shaped language model, "ids": a safetensors file with ids [n, T], "batch",
"special": ids of special tokens, "saelens": [folders], "dictionary_learning": [folders], "hook": the site of all};
prints a JSON line of figures for each folder. sae_lens' are by `run_evals`: `own` with special tokens left out, as it
does, `free` on the contexts that have none, where nothing is to be left out.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from dictionary_learning.evaluation import evaluate
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.contestants.contexts import Contexts


def hooked(folder: str) -> Any:
    """Return a local GPT-2 as a HookedTransformer: its own loader takes names of the hub only."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    c = model.config
    config = HookedTransformerConfig(
        n_layers=c.n_layer,
        d_model=c.n_embd,
        n_ctx=c.n_positions,
        d_head=c.n_embd // c.n_head,
        n_heads=c.n_head,
        d_mlp=c.n_inner or 4 * c.n_embd,
        d_vocab=c.vocab_size,
        act_fn=c.activation_function,
        eps=c.layer_norm_epsilon,
        normalization_type="LN",
        attention_dir="causal",
        use_attn_scale=c.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=c.scale_attn_by_inverse_layer_idx,
        device="cpu",
        original_architecture="GPT2LMHeadModel",
    )
    hooked_model: Any = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder))
    hooked_model.load_and_process_state_dict(
        convert_gpt2_weights(model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return hooked_model.eval()


def saelens(folder: str, model: Any, ids: Tensor, batch: int, special: list[int] | bool) -> dict[str, float]:
    store: Any = Contexts(ids, batch)
    batches = -(-len(ids) // batch)
    asked = EvalConfig(
        batch_size_prompts=batch,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        compute_kl=True,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    sae: Any = SAE.load_from_disk(folder)
    groups, _ = run_evals(sae, store, model, ActivationScaler(), asked, exclude_special_tokens=special)
    return {name: value for group in groups.values() for name, value in group.items()}


def dictionary_learning(folder: str, rows_ND: Tensor, batch: int) -> dict[str, float]:
    """Score dictionary_learning's way on `rows_ND`: the site's rows, of the tokens that count;
    its evaluation takes them a batch at a time."""
    ae, _ = load_dictionary(folder, device="cpu")
    whole = len(rows_ND) // batch

    def batches() -> Iterator[Tensor]:
        yield from torch.split(rows_ND[: whole * batch], batch)

    figures: dict[str, float] = evaluate(ae, batches(), device="cpu", n_batches=whole)
    return figures


@torch.no_grad()
def main() -> None:
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    ids, model = load_file(job["ids"])["ids"], hooked(job["model"])
    keep = ~torch.isin(ids, torch.tensor(job["special"]))
    for folder in job["saelens"]:
        answer = {"folder": folder, "own": saelens(folder, model, ids, job["batch"], job["special"])}
        answer["free"] = saelens(folder, model, ids[keep.all(1)], job["batch"], False)
        print(json.dumps(answer), flush=True)
    hook = job["hook"]
    if not job["dictionary_learning"]:
        return
    parts = [model.run_with_cache(part, names_filter=[hook])[1][hook] for part in torch.split(ids, job["batch"])]
    rows_ND = torch.cat(parts)[keep]
    for folder in job["dictionary_learning"]:
        print(json.dumps({"folder": folder, "own": dictionary_learning(folder, rows_ND, 4096)}), flush=True)


if __name__ == "__main__":
    main()
