# `make demo` and `make test` are all a newcomer needs; both set up .venv on their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STDLIB = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('stdlib'))")

HIDE_FEW_GPUS = gpus=$$($(BIN)/python -c "import torch; print(torch.cuda.device_count())"); \
	if [ $$gpus -lt 4 ]; then export CUDA_VISIBLE_DEVICES=; fi;

.PHONY: setup setup-run demo demo-resume test test-all test-gpu lint format clean

# Bytecode is compiled when it is first imported: doing it for all of PyTorch takes longer than the rest.
INSTALL = $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --disable-pip-version-check --no-compile --editable

# All that development and tests need.
setup: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml
	$(INSTALL) '.[dev]'
	touch $(VENV)/.runtime $@

# What running needs, and no more.
setup-run: $(VENV)/.runtime

$(VENV)/.runtime: pyproject.toml
	$(INSTALL) .
	touch $@

# The standard library's own source files as bytes, one document a file; one file in twenty is held out.
data/stdlib.json: | setup-run
	$(BIN)/griffin data build data/stdlib "$(STDLIB)" --tokenizer bytes --glob '*.py' \
	  --exclude site-packages --exclude test --exclude tests --exclude idle_test \
	  --hold-out 0.05 --hold-out-prefix data/stdlib-held-out

# On CPUs unless there is a GPU for each of the four ranks.
demo: data/stdlib.json
	$(HIDE_FEW_GPUS) $(BIN)/griffin train trainer/configs/demo.toml --ranks 4

# The newest run of the demo goes on for 20 steps in another layout: data 2 instead of tensor 2 x pipeline 2.
demo-resume: data/stdlib.json
	run=$$(ls -td runs/demo-*/ 2>/dev/null | head -n 1); \
	if [ -z "$$run" ]; then echo "There is no run of the demo yet: make demo" >&2; exit 2; fi; \
	$(HIDE_FEW_GPUS) $(BIN)/griffin train trainer/configs/demo.toml --ranks 2 --run-dir "$$run" \
	  --parallel.tensor 1 --parallel.pipeline 1 --train.steps 90

# Two processes that take a file of tests at a time: a test of several ranks leaves a core free in much of its time.
AT_ONCE = -n 2 --dist loadfile

test: setup
	$(BIN)/python -m pytest $(AT_ONCE)

test-all: setup
	$(BIN)/python -m pytest $(AT_ONCE) -m 'not alone'
	$(BIN)/python -m pytest -m alone

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
