"""Make the embedded language model: `python -m harvest.embedded.make --out DIR --minutes 60`.

A GPT-2-shaped model trained on the training split of the running Python's standard library. Runs on a CPU (bfloat16
products, float32 weights), writes a checkpoint each few minutes and goes on from it when called again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from harvest.documents import TRAIN, Document, StdlibText, split_of, unique
from harvest.embedded.ngram import NGram, Tokens

END = "<|endoftext|>"
HELDOUT_FRACTION = 0.1


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the model, given the text."""

    vocab: int = 2048
    layers: int = 6
    width: int = 192
    heads: int = 6
    context: int = 256
    dropout: float = 0.1
    batch: int = 16
    epochs: float = 6.0
    matrix_lr: float = 0.02
    vector_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.02
    seed: int = 0


def split_documents() -> tuple[list[Document], list[Document]]:
    """Split documents (training, held-out) of the standard library, by the same rule as the harvest's."""
    train: list[Document] = []
    heldout: list[Document] = []
    for doc in unique(StdlibText().documents()):
        (train if split_of(doc.key, HELDOUT_FRACTION) == TRAIN else heldout).append(doc)
    return train, heldout


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the training texts alone; token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, docs: list[Document]) -> list[Tokens]:
    """Tokenize to one array a document, each led by the end-of-text token."""
    return [np.array([0, *e.ids], np.int64) for e in tokenizer.encode_batch([d.text for d in docs])]


def epoch_windows(docs: list[Tokens], context: int, rng: np.random.Generator) -> Tokens:
    """Cut the windows [N, context] of one epoch: documents in a new order, cut at a new offset, windows shuffled."""
    stream = np.concatenate([docs[i] for i in rng.permutation(len(docs))])
    stream = stream[rng.integers(context) :]
    windows = stream[: len(stream) // context * context].reshape(-1, context)
    return windows[rng.permutation(len(windows))]


def batches(docs: list[Tokens], recipe: Recipe, start: int) -> Iterator[Tensor]:
    """Yield [batch, context] token batches from step `start` on, a pure function of the recipe."""
    step, epoch = 0, 0
    while True:
        windows = epoch_windows(docs, recipe.context, np.random.default_rng([recipe.seed, epoch]))
        for i in range(0, len(windows) - recipe.batch + 1, recipe.batch):
            if step >= start:
                yield torch.from_numpy(windows[i : i + recipe.batch])
            step += 1
        epoch += 1


def build_model(recipe: Recipe) -> GPT2LMHeadModel:
    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=recipe.vocab,
        n_positions=recipe.context,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def build_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Make Muon for the blocks' matrices, AdamW for embeddings, biases and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, total: int, recipe: Recipe) -> float:
    """Compute the learning rate's factor: linear warm-up, then linear to zero."""
    at = step / total
    return min(at / recipe.warmup, (1 - at) / (1 - recipe.warmup))


def token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute the next-token cross-entropy in nats, [batch, context - 1]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        logits = model(input_ids=ids, use_cache=False).logits
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return nats.view(len(ids), -1)


@torch.no_grad()
def heldout_nats(model: nn.Module, windows: Tokens) -> float:
    model.eval()
    parts = np.array_split(windows, len(windows) // 32 + 1)
    total: float = sum(float(token_loss(model, torch.from_numpy(part)).sum()) for part in parts)
    model.train()
    return total / float(len(windows) * (windows.shape[1] - 1))


@dataclass
class Run:
    """A training under way: what a checkpoint holds."""

    model: GPT2LMHeadModel
    optimizers: list[torch.optim.Optimizer]
    curve: list[dict[str, float]]
    step: int

    def save(self, path: Path) -> None:
        optimizers = [o.state_dict() for o in self.optimizers]
        state = {"model": self.model.state_dict(), "optimizers": optimizers, "curve": self.curve, "step": self.step}
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.curve, self.step = state["curve"], state["step"]


def train_model(docs: list[Tokens], heldout: Tokens, recipe: Recipe, folder: Path) -> GPT2LMHeadModel:
    """Train to the recipe's last step, going on from `folder`/checkpoint.pt where there is one."""
    model = build_model(recipe)
    run = Run(model, build_optimizers(model, recipe), [], 0)
    base = [o.param_groups[0]["lr"] for o in run.optimizers]
    tokens = recipe.batch * recipe.context
    total = int(recipe.epochs * sum(map(len, docs)) / tokens)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    torch.manual_seed(recipe.seed + run.step)
    start, began = run.step, time.monotonic()
    for ids in itertools.islice(batches(docs, recipe, start), total - start):
        for optimizer, lr in zip(run.optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * schedule(run.step + 1, total, recipe)
        loss = token_loss(model, ids).mean()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        if run.step % 250 == 0 or run.step == total:
            nats = heldout_nats(model, heldout)
            run.curve.append({"step": run.step, "tokens": run.step * tokens, "train": loss.item(), "heldout": nats})
            rate = (run.step - start) * tokens / (time.monotonic() - began)
            left = (total - run.step) * tokens / rate / 60
            print(f"step {run.step}/{total}  train {loss.item():.3f}  held out {nats:.4f}  ", end="")
            print(f"{rate:,.0f} tokens/s, {left:.0f} minutes left", flush=True)
            run.save(checkpoint)
    (folder / "curve.json").write_text(json.dumps(run.curve))
    return model


def windows_of(docs: list[Tokens], context: int) -> Tokens:
    stream = np.concatenate(docs)
    return stream[: len(stream) // context * context].reshape(-1, context)


def baselines(docs: list[Tokens], windows: Tokens, vocab: int) -> dict[str, float]:
    """Measure the nats of the n-gram models on the tokens the language model is scored on:
    all but each window's first."""
    counted = np.concatenate([d for i, d in enumerate(docs) if i % 10])
    fitted = np.concatenate(docs[::10])
    scored = np.ones(windows.shape, bool)
    scored[:, 0] = False
    result = {}
    for order, name in ((1, "unigram"), (2, "bigram"), (3, "trigram")):
        nats = NGram(counted, fitted, order, vocab).nats(windows.ravel())
        result[name] = float(nats[scored.ravel()[order - 1 :]].mean())
    return result


@torch.no_grad()
def sample(model: GPT2LMHeadModel, tokenizer: Tokenizer, prompt: str, length: int = 120) -> str:
    torch.manual_seed(0)
    model.eval()
    ids = torch.tensor([[0, *tokenizer.encode(prompt).ids]])
    for _ in range(length):
        logits = model(input_ids=ids, use_cache=False).logits[0, -1] / 0.7
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1)[None]], 1)
    return tokenizer.decode(ids[0, 1:].tolist())


def save_model(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, model.safetensors in float16 and the tokenizer's files."""
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    fast.model_max_length = model.config.n_positions
    fast.save_pretrained(folder)


def card_text(card: dict[str, Any], curve: list[dict[str, float]]) -> str:
    """Write the model's card, every figure from the run that made it."""
    recipe, nats = card["recipe"], card["nats"]
    scores = "\n".join(f"| {name} | {nats[name]:.4f} |" for name in ("unigram", "bigram", "trigram", "model"))
    points = "\n".join(f"| {p['step']:,} | {p['tokens']:,} | {p['train']:.3f} | {p['heldout']:.4f} |" for p in curve)
    sample = "\n".join(f"    {line}".rstrip() for line in card["sample"].splitlines())
    return f"""# The embedded language model

A GPT-2-shaped model of {recipe["layers"]} layers, width {recipe["width"]}, {recipe["heads"]} heads, context
{recipe["context"]} and a byte-level BPE vocabulary of {recipe["vocab"]:,}, in float16. It is here so that the demo and
the tests have a language model without a download; it has learnt what Python source looks like, and nothing else.

Made by `python -m harvest.embedded.make --out DIR` (needs the environment of `make setup`), which goes on from its
checkpoint when it is called again.

## Data

The standard library of Python {card["python"]}, without test packages and encodings: {card["train_tokens"]:,} tokens in
{card["train_files"]} training files, {card["heldout_tokens"]:,} in {card["heldout_files"]} held-out ones. A file is
held out by a hash of its module path, so on every Python version the demo's held-out documents are ones the model was
not trained on. The tokenizer saw the training files alone.

## Held-out cross-entropy

In nats a token, on the same {card["heldout_tokens"]:,} tokens in windows of {recipe["context"]} (each window's first
token is not predicted). The n-gram models are interpolated, with weights fitted on a tenth of the training files by
expectation-maximisation; they see the full text before a window, the model only the window.

| | nats |
|---|---|
{scores}

## Curve

{recipe["epochs"]:g} epochs, batches of {recipe["batch"] * recipe["context"]:,} tokens, dropout {recipe["dropout"]};
Muon for the blocks' matrices and AdamW for the rest, linear decay to zero.

| step | tokens | training batch | held out |
|---|---|---|---|
{points}

## Sample

At temperature 0.7 from `def `:

{sample}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, model and figures")
    for field in dataclasses.fields(Recipe):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = vars(parser.parse_args())
    out: Path = args.pop("out")
    recipe = Recipe(**args)
    out.mkdir(parents=True, exist_ok=True)
    train_docs, heldout_docs = split_documents()
    tokenizer = train_tokenizer([d.text for d in train_docs], recipe.vocab)
    tokens, heldout = tokenize(tokenizer, train_docs), windows_of(tokenize(tokenizer, heldout_docs), recipe.context)
    figures = baselines(tokens, heldout, recipe.vocab)
    print(
        f"{len(tokens)} training files, {len(heldout_docs)} held out; n-gram baselines in nats: {figures}", flush=True
    )
    model = train_model(tokens, heldout, recipe, out)
    save_model(model, tokenizer, out)
    stored = GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32)
    card = {
        "recipe": dataclasses.asdict(recipe),
        "python": platform.python_version(),
        "train_files": len(train_docs),
        "train_tokens": sum(map(len, tokens)),
        "heldout_files": len(heldout_docs),
        "heldout_tokens": int(heldout.size),
        "nats": {**figures, "model": heldout_nats(stored, heldout)},
        "sample": sample(stored, tokenizer, "def "),
    }
    (out / "card.json").write_text(json.dumps(card, indent=1))
    (out / "README.md").write_text(card_text(card, json.loads((out / "curve.json").read_text())))


if __name__ == "__main__":
    main()
