# The commands of a checkout. `make help` lists them. PYTHON (3.11 or newer) makes the virtual environment in VENV.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Files of tests that run at a time, each worker with a jax of its own (4 GB in the end); 0 for none but the process itself, as --pdb wants.
WORKERS ?= 2

BIN := $(VENV)/bin
# A stamp is newer than pyproject.toml while what was installed is what it asks for.
USER := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
ORACLE := $(VENV)/.installed-oracle
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help train test test-all smoke lint types docs format clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(USER)  ## install, then train the default experiment (ARGS="nano --optim.lr 1e-3" are passed on)
	$(BIN)/slmjax train $(ARGS)

test: $(DEV)  ## install the dev extra, then run the tests (ARGS="tests/test_config.py" are passed on)
	$(PYTEST) $(ARGS)

test-all: $(ORACLE)  ## install what tests compare with as well, then run the tests and the nightly ones
	$(PYTEST) -m "nightly or not nightly" $(ARGS)

smoke: $(DEV)  ## the few tests that tell whether a Python version works
	$(PYTEST) -m "smoke and not nightly" $(ARGS)

lint: $(DEV)  ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(DEV)  ## build the site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(DEV)  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## delete the virtual environment and what tools left behind
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "slmjax needs Python 3.11 or newer, and $(PYTHON) is older: run make with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(USER): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[plot]'
	@touch $@

$(ORACLE): $(DEV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,oracle]'
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(USER)
