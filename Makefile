# make book   set up, execute the notebooks, build the site into _build/html
# make site   build the site from the notebooks as they are
# make test   set up, unit tests, then every notebook against its committed outputs from an empty result store
# make setup  the virtual environment in .venv, and Tesseract
# make check  before a commit: format, style, types, and the quick tests with the examples of docstrings; three minutes
# make mutants MODULE=metrics   small faults planted in one module: which do its tests not notice?
# make benchmark   speed and memory, as ratios within one run
# make pins   take the newest packages that pyproject.toml allows into constraints.txt
# make lint, make clean

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup tesseract chromium book site check test mutants benchmark lint types pins clean

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
TORCH_RANGE := $(shell sed -n 's/.*"\(torch[^"]*\)".*/\1/p' pyproject.toml)

CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
CELL_TIMEOUT ?= 1800

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
	@scripts/ensure_tool.sh tesseract

# Without it the browser tests are skipped, unless TEXTLOC_BROWSER=required asks for them.
chromium:
	@scripts/ensure_tool.sh chromium || [ "$${TEXTLOC_BROWSER-}" != required ]

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
	@$(PIP) uninstall -y torch 2>/dev/null || true
	@$(PIP) install --no-index --no-deps $(TORCH_PIN) 2>/dev/null || \
	  $(PIP) install --index-url https://download.pytorch.org/whl/cpu --no-deps $(TORCH_PIN) || \
	  { echo "no CPU build of $(TORCH_PIN) to be had; TORCH=cuda takes the package index's build" >&2; exit 1; }
endif
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt $(VENV)/torch-$(TORCH)
	@echo "installing the package and its dependencies"
	@$(PIP) install -c constraints.txt -e ".[book,ocr,test]"
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1
	@touch $@

# --- the book -------------------------------------------------------------------------------------------------

# Notebooks whose own cells, package, data or requirements changed are executed, the others left alone.
book: setup
	@$(BIN)/textloc run --timeout $(CELL_TIMEOUT)
	@$(MAKE) --no-print-directory site

site: setup
	@$(BIN)/jupyter-book build . --all -W -n --keep-going
	@echo "the book is in _build/html/index.html"

# --- checks ---------------------------------------------------------------------------------------------------

check: lint types
	@OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not full" \
	  --doctest-modules textloc_utils tests --ignore tests/benchmarks

# The notebooks go in the book's order: by their number of cells the longest, the first, would come late, and run alone.
test: setup chromium
	@OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --durations 25 tests --ignore tests/benchmarks
	@store=$$(mktemp -d); trap 'rm -rf "$$store"' EXIT; \
	  TEXTLOC_RESULTS="$$store" OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 \
	  $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  --nbval-lax --nbval-cell-timeout=$(CELL_TIMEOUT) notebooks/*.ipynb

benchmark: setup
	@OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 $(BIN)/python -m pytest -q -s tests/benchmarks

lint: setup
	@$(BIN)/ruff check --no-cache .
	@$(BIN)/ruff format --check .

types: setup
	@$(BIN)/mypy

mutants: setup
	@$(BIN)/python scripts/mutants.py $(MODULE) --jobs $(JOBS)

# A fresh environment from the ranges of pyproject.toml alone becomes the lock. `make test` then says whether all still
# holds. What a pinned package brings along is pinned as well; versions carry no label of one machine's build.
# Newer Pythons and other systems resolve to packages that the oldest supported Python on Linux may not have.
pins: $(VENV)/bin/python
	@$(BIN)/python -c "import sys; sys.exit(sys.platform != 'linux' or sys.version_info[:2] != (3, 11))" || \
	  { echo "make pins needs Linux and the oldest supported Python, 3.11: make clean, then make pins PYTHON=python3.11" >&2; exit 1; }
	@rm -rf _build/pins && $(BIN)/python -m venv _build/pins
	@_build/pins/bin/python -m pip -qq install --no-index --no-deps "$(TORCH_RANGE)" 2>/dev/null || \
	  _build/pins/bin/python -m pip -qq install --index-url https://download.pytorch.org/whl/cpu --no-deps "$(TORCH_RANGE)"
	@_build/pins/bin/python -m pip -qq install -e ".[book,ocr,test]"
	@_build/pins/bin/python -m pip freeze --all --exclude-editable --exclude pip --exclude wheel >_build/pins/frozen
	@{ sed -n '/^#/p' constraints.txt; sed 's/+[a-z0-9.]*$$//' _build/pins/frozen | LC_ALL=C sort -f; } >_build/constraints.txt
	@mv _build/constraints.txt constraints.txt && rm -rf _build/pins
	@git --no-pager diff --stat constraints.txt 2>/dev/null || true
	@echo "constraints.txt holds the newest packages; run make test"

# Leaves the result store and the executed notebooks alone.
clean:
	rm -rf $(VENV) _build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find textloc_utils tests book -name __pycache__ -type d -prune -exec rm -rf {} +
