# `make` lists the targets. Each creates what it needs: `make demo` and `make test` also set up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('stdlib'))")

HIDE_FEW_GPUS = gpus=$$($(BIN)/python -c "import torch; print(torch.cuda.device_count())"); \
	if [ $$gpus -lt 4 ]; then export CUDA_VISIBLE_DEVICES=; fi;

.DEFAULT_GOAL := help
.PHONY: help setup setup-run demo demo-resume test test-all test-gpu bench-gpu lint format clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'

# Bytecode is compiled at the first import: compiling all of PyTorch's takes longer than the rest of the installation.
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --disable-pip-version-check --no-compile --editable

setup: $(VENV)/.complete ## create .venv with all that development and tests need

$(VENV)/.complete: pyproject.toml
	$(INSTALL) '.[dev]'
	touch $(VENV)/.runtime $@

setup-run: $(VENV)/.runtime ## create .venv with what running needs

$(VENV)/.runtime: pyproject.toml
	$(INSTALL) .
	touch $@

# The source files of Python's standard library as bytes, a document per file; one file in twenty is held out.
data/stdlib.json: | setup-run
	$(BIN)/griffin data build data/stdlib "$(STDLIB)" --tokenizer bytes --glob '*.py' \
	  --exclude site-packages --exclude test --exclude tests --exclude idle_test \
	  --hold-out 0.05 --hold-out-prefix data/stdlib-held-out

# On CPUs unless there is a GPU for each of the four ranks.
demo: data/stdlib.json ## train a small Griffin on 4 ranks (tensor 2 x pipeline 2)
	$(HIDE_FEW_GPUS) $(BIN)/griffin train trainer/configs/demo.toml --ranks 4

# 20 more steps of the demo's newest run.
demo-resume: data/stdlib.json ## resume it on 2 ranks (data 2)
	run=$$(ls -td runs/demo-*/ 2>/dev/null | head -n 1); \
	if [ -z "$$run" ]; then echo "There is no run of the demo yet: make demo" >&2; exit 2; fi; \
	$(HIDE_FEW_GPUS) $(BIN)/griffin train trainer/configs/demo.toml --ranks 2 --run-dir "$$run" \
	  --parallel.tensor 1 --parallel.pipeline 1 --train.steps 90

# Two pytest workers, a file of tests at a time: multi-rank tests leave a core idle for much of their time.
AT_ONCE = -n 2 --dist loadfile

test: setup ## run the quick tests
	$(BIN)/python -m pytest $(AT_ONCE)

test-all: setup ## run all tests, the slow ones too
	$(BIN)/python -m pytest $(AT_ONCE) -m 'not alone'
	$(BIN)/python -m pytest -m alone

test-gpu: setup ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

# A step of griffin-1.3b, and one of six blocks of griffin-14b with a quarter of its vocabulary, as tensor ranks have.
# Both are counted and measured for the same configuration, and need the memory of an H100. All lines run, also after
# one has failed.
STAGE = --model.pattern '["recurrent", "recurrent", "attention", "recurrent", "recurrent", "attention"]' \
	--model.vocabulary 64000 --parallel.tensor 1 --parallel.sequence_parallel false

bench-gpu: setup ## on one GPU: test, time the kernels, and two models' steps beside their prediction
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make bench-gpu: needs a GPU; torch finds none')"
	failed=0; \
	$(BIN)/python -m pytest -m gpu || failed=1; \
	$(BIN)/griffin bench kernels --no-peers --widths 2048,2560 --lengths 2048 --batches 4 || failed=1; \
	$(BIN)/griffin bench count griffin-1.3b --global-batch 16 --measure || failed=1; \
	$(BIN)/griffin bench count griffin-14b-h100-8x8 $(STAGE) --global-batch 16 --measure || failed=1; \
	exit $$failed

lint: setup ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove build outputs and caches
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
