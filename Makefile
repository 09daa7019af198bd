# Thresher's table of contents. Settings of a stage go in ARGS: make train ARGS="sae=gated sae.width=4096"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
PEERS ?= .venv-peers
ARGS ?=
PY := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup peers demo harvest train sweep evaluate claims test lint types test-slow clean

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
	$(PY) -m train -m sae=relu,topk,batchtopk,matryoshka,gated,jumprelu hydra.sweep.dir=outputs/demo/saes
	$(PY) -m evaluate saes=outputs/demo/saes out=outputs/demo features=best

harvest: setup ## language model -> cached activations
	$(PY) -m harvest $(ARGS)

train: setup ## cached activations -> one SAE
	$(PY) -m train $(ARGS)

sweep: setup ## cached activations -> many SAEs in one pass, one for each combination of the values in ARGS
	$(PY) -m train -m $(ARGS)

evaluate: setup ## splice SAEs into the language model and score them
	$(PY) -m evaluate $(ARGS)

# What make claims runs on: LM is the model, its text and packing as overrides; widths are multiples of the site's, of
# which WIDTH and WIDEST are the ones where one is fixed; K is near a 24th of the site's width.
LM ?=
SITE ?= resid_post.3
ROWS ?= 1_100_000
TOKENS ?= 1_000_000
SPECIAL_ROWS ?= 400_000
SPECIAL_TOKENS ?= 300_000
CALIBRATION ?= 65_536
WIDTHS ?= 4,8,16,32
WIDTH ?= 8
WIDEST ?= 32
K ?= 8
KS ?= 4,8,16
RIVAL_KS ?= 4,8,16,24
BATCH ?= 1024
BATCHES ?= 256,4096
LR ?= 2e-3
RIVAL_LR ?= 3e-3
BASELINE_LR ?= 2e-3
SEEDS ?= 0
CLAIMS ?= outputs/claims

SPECIAL = packing.bos=context packing.keep_special=true
SHARED = calibration_tokens=$(CALIBRATION) batch=$(BATCH)
SWEEP = $(PY) -m train -m $(LM) site=$(SITE) tokens=$(TOKENS) seed=$(SEEDS) $(SHARED) hydra.sweep.dir=$(CLAIMS)/saes
FAMILY = sae.expansion=$(WIDTH) sae.k=$(K) optimizer.lr=$(LR)
RIVALS = sae.expansion=$(WIDTH) sae.k=$(RIVAL_KS)

claims: setup ## try the papers' claims on a model: harvest, SAEs, verdicts; leaves outputs/claims/claims.md
	$(PY) -m harvest $(LM) sites=[$(SITE)] tokens=$(ROWS)
	$(PY) -m harvest $(LM) sites=[$(SITE)] tokens=$(SPECIAL_ROWS) $(SPECIAL)
	$(SWEEP)/grid +claims=grid sae.expansion=$(WIDTHS) sae.k=$(KS) optimizer.lr=$(LR)
	$(SWEEP)/dead +claims=dead sae.expansion=$(WIDEST) sae.k=$(K) optimizer.lr=$(LR)
	$(SWEEP)/rivals +claims=rivals $(RIVALS) optimizer.lr=$(RIVAL_LR)
	$(SWEEP)/baseline +claims=baseline $(RIVALS) optimizer.lr=$(BASELINE_LR)
	$(SWEEP)/batch +claims=batch $(FAMILY) batch=$(BATCHES)
	$(SWEEP)/special +claims=special $(SPECIAL) tokens=$(SPECIAL_TOKENS) $(FAMILY) sae.k=$(KS)
	$(PY) -m benchmarks.claims saes=$(CLAIMS)/saes out=$(CLAIMS) expansion=$(WIDTH) $(SHARED) $(ARGS)

test: lint types ## lint, types and the fast tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy

test-slow: setup ## the slower proofs
	$(PY) -m pytest -q -m slow

clean: ## remove what the runs left in outputs/ (asks first)
	@printf "remove outputs/ with its caches and SAEs? [y/N] "; read answer; [ "$$answer" = y ] && rm -r outputs
