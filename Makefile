# Everything runs in .venv; a recipe stops at its first failing command.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-done
ADAPTER ?= $(shell ls -td runs/demo-*/adapter 2>/dev/null | head -n 1)
PORT ?= 8000
WORKERS ?= 2

.PHONY: help setup model lint typecheck test test-all mutants chaos demo serve bench bench-peers clients gpu-day docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with every dependency at its pinned version

# torch goes first and alone, so that a machine's own choice of torch build is kept by everything after it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: PYTHON=$(PYTHON): older than Python 3.11 or missing; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch==2.13.0
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

model: setup ## fetch the demo's base model, smollm2-135m, into the cache folder
	@$(PY) -m parallelmind.model.base_model

lint: setup ## ruff: style rules and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

typecheck: setup ## mypy
	@$(PY) -m mypy

test: setup lint typecheck model ## lint, typecheck and the tests that one waits for; the quick ones in WORKERS=2 processes
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not full and not chaos"
	@$(PY) -m pytest -m "slow and not full and not chaos"

test-all: test chaos ## every test: make test, every model type, every page, databases and the longest fault tests
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "full and not slow and not chaos"
	@$(PY) -m pytest -m "full and slow and not chaos"

mutants: setup model ## break the code in known ways, one by one; the tests must notice each
	@$(PY) -m tools.mutants

chaos: setup ## the longest fault tests: nodes are killed or cut off, storage outlives machines
	@$(PY) -m pytest -m chaos tests/chaos tests/integration

demo: setup model ## train a small adapter and decode with it
	@$(PY) -m workloads.demo

serve: setup ## serve the newest demo adapter at http://127.0.0.1:8000; ADAPTER=folder and PORT=number choose others
	@test -n "$(ADAPTER)" || { echo "error: ADAPTER: there is no runs/demo-*/adapter; run make demo first, or give ADAPTER=folder" >&2; exit 1; }
	@$(PY) -m serving lora_path="$(ADAPTER)" port="$(PORT)"

bench: setup model ## print the benchmark table; ONLY=decoding runs one part
	@$(PY) -m benchmarks $(ONLY)

bench-peers: setup model ## install the engines that make bench compares with, in venvs of their own; PEERS=folder chooses where
	@$(PY) -m benchmarks.peers.install

clients: setup ## install the clients of OpenAI's API that the server is tested with; CLIENTS=folder chooses where
	@$(PY) -m benchmarks.clients.install

gpu-day: setup ## with a GPU: its tests, tokens/s and MFU of training, decoding; at most 9 minutes, a second call goes on
	@$(PY) -m benchmarks.gpu_day

docs: setup model ## write the generated parts of docs/: reference, table of models (minutes), memory estimates, mistakes, figures
	@$(PY) -m tools.reference
	@$(PY) -m tools.source_files
	@$(PY) -m tools.memory
	@$(PY) -m tools.mistakes
	@$(PY) -m tools.refusals
	@$(PY) -m tools.figures
	@$(PY) -m workloads.evaluate support output_path=docs/models.md

clean: ## remove .venv, caches and build outputs, not runs
	rm -rf $(VENV) build dist platform/*.egg-info *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find platform workloads serving experiments tools tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
