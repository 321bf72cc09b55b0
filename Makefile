# make book   set up, execute the notebooks, build the site into _build/html
# make test   set up, unit tests, then every notebook against its committed outputs from an empty result store
# make setup  the virtual environment in .venv, and Tesseract
# make benchmark   speed and memory, as ratios within one run
# make lint, make clean

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup tesseract book test benchmark lint clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input

# The first Python that pyproject.toml's requires-python takes; PYTHON=... names another.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
endif
# TORCH=cuda or TORCH=cpu overrides what nvidia-smi says.
ifndef TORCH
TORCH := $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
endif
TORCH_PIN := $(shell grep '^torch==' constraints.txt)

CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
CELL_TIMEOUT ?= 900

NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
EXECUTED := $(NOTEBOOKS:notebooks/%.ipynb=_build/executed/%.stamp)
# What a notebook's outputs depend on: the package and the data, results and training runs aside.
INPUTS := $(shell find textloc_utils data -type f -not -path '*/__pycache__/*' -not -path 'data/results/*' \
  -not -path 'data/runs/*' -not -name README.md 2>/dev/null)

# One process per core with one thread each: two processes with a thread per core each are many times slower.
JOBS := $(shell echo $$(($(CORES) > 4 ? 4 : $(CORES))))
export OMP_THREAD_LIMIT ?= $(CORES)
export TQDM_DISABLE := 1
export HF_HUB_OFFLINE ?= 1

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# --- set-up ---------------------------------------------------------------------------------------------------

setup: $(VENV)/installed tesseract

tesseract:
	@scripts/ensure_tesseract.sh

$(VENV)/bin/python:
	@[ -n "$(PYTHON)" ] || { \
	  echo "no Python from 3.11 to 3.14 found: install one, or name it with PYTHON=..." >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot create virtual environments: install its venv package (Debian: python3-venv)" >&2; exit 1; }

# torch comes first and alone, so that the rest of the environment takes this build. A wheel that pip is
# configured to find locally is taken before any index is asked.
$(VENV)/torch-$(TORCH): constraints.txt | $(VENV)/bin/python
	@rm -f $(VENV)/torch-* $(VENV)/installed
	@echo "installing $(TORCH_PIN) ($(TORCH))"
ifeq ($(TORCH),cuda)
	@$(PIP) uninstall -y torch || true
	@$(PIP) install -c constraints.txt $(TORCH_PIN)
	@$(BIN)/python -c "import torch, sys; sys.exit(torch.version.cuda is None and 'pip gave a torch without CUDA')"
else
	@$(PIP) install --no-index --no-deps $(TORCH_PIN) 2>/dev/null || \
	  $(PIP) install --index-url https://download.pytorch.org/whl/cpu --no-deps $(TORCH_PIN) || \
	  { echo "no CPU build of $(TORCH_PIN) to be had; TORCH=cuda takes the package index's build" >&2; exit 1; }
endif
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt $(VENV)/torch-$(TORCH)
	@echo "installing the package and its dependencies"
	@$(PIP) install -c constraints.txt -e ".[book,test]"
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1
	@touch $@

# --- the book -------------------------------------------------------------------------------------------------

# A notebook is executed to a scratch path and replaces the old one only after it ran through; what differs
# from run to run is taken out first.
_build/executed/%.stamp: notebooks/%.ipynb $(INPUTS) constraints.txt | setup
	@mkdir -p $(@D)
	@echo "executing $<"
	@$(BIN)/papermill --no-progress-bar --execution-timeout $(CELL_TIMEOUT) --kernel python3 \
	  $< $(@D)/$*.ipynb >$(@D)/$*.log 2>&1 || { \
	  tail -n 40 $(@D)/$*.log >&2; echo "$< failed; it is left as it was" >&2; exit 1; }
	@$(BIN)/nbstripout --keep-output --keep-count --extra-keys \
	  "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info.version" \
	  $(@D)/$*.ipynb
	@mv $(@D)/$*.ipynb $<
	@touch $@

book: setup $(EXECUTED)
	@$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "the book is in _build/html/index.html"

# --- checks ---------------------------------------------------------------------------------------------------

test: setup
	@OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile tests --ignore tests/benchmarks
	@store=$$(mktemp -d); trap 'rm -rf "$$store"' EXIT; \
	  TEXTLOC_RESULTS="$$store" OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 \
	  $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile \
	  --nbval-lax --nbval-cell-timeout=$(CELL_TIMEOUT) notebooks

benchmark: setup
	@OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 $(BIN)/python -m pytest -q -s tests/benchmarks

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# Leaves the result store and the executed notebooks alone.
clean:
	rm -rf $(VENV) _build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find textloc_utils tests book -name __pycache__ -type d -prune -exec rm -rf {} +
