# make venv | train | test | test-vllm | bench | bench-check | recipes | docs | models | lint. The first of them on a fresh machine builds the environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CONFIG ?= configs/default.yaml
ARGS ?=

.PHONY: venv train test test-vllm bench bench-check recipes docs models lint clean
.DELETE_ON_ERROR:

venv: $(VENV)/.complete

# Without an NVIDIA GPU the CPU build of torch is taken where the package index offers one: it is a tenth of the size.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1 \
	  || $(BIN)/pip install --quiet "torch==$(TORCH)+cpu" 2>/dev/null \
	  || echo "no CPU build of torch $(TORCH) on the package index: installing its standard build"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

train: venv
	$(BIN)/python -m distill.train --config $(CONFIG) $(ARGS)

test: venv
	$(BIN)/python -m pytest -n auto $(ARGS)

# A real vLLM server, in an environment of its own (.venv-vllm, 3.4 GB).
test-vllm: venv
	PYTHON=$(PYTHON) tests/vllm/environment.sh
	DISTILL_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -s tests/vllm $(ARGS)

bench: venv
	$(BIN)/python -m pytest benchmarks $(ARGS)

bench-check: venv
	PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.check $(ARGS)

recipes: venv
	$(BIN)/python -m pytest -s docs/recipes $(ARGS)

docs: venv
	PYTHONPATH=.:kernels $(BIN)/python docs/configuration.py

# Examines every family of models that transformers knows and writes docs/models.md; ARGS="llama qwen3" only tells.
models: venv
	$(BIN)/python tests/families.py $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
