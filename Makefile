# The commands of a checkout. `make help` lists them. PYTHON (3.11 or newer) makes the virtual environment in VENV.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Number of test files that run at a time, each in a worker with its own jax (up to 4 GB); 0 runs all in one process, as --pdb needs.
WORKERS ?= 2

BIN := $(VENV)/bin
# Each stamp is newer than pyproject.toml while the installed packages are those that it lists.
USER := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
ORACLE := $(VENV)/.installed-oracle
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help train test test-all smoke lint types docs wheel format clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(USER)  ## install, then train the default experiment (ARGS="nano --optim.lr 1e-3" are passed on)
	$(BIN)/slmjax train $(ARGS)

test: $(DEV)  ## install the dev extra, then run the tests (ARGS="tests/test_config.py" are passed on)
	$(PYTEST) $(ARGS)

test-all: $(ORACLE)  ## install the oracle extra as well, then run all tests, the nightly ones included
	$(PYTEST) -m "nightly or not nightly" $(ARGS)

smoke: $(DEV)  ## run the few tests that show whether a Python version works
	$(PYTEST) -m "smoke and not nightly" $(ARGS)

lint: $(DEV)  ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(DEV)  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(DEV)  ## write the generated parts of docs/*.md, and build the site into site/
	$(BIN)/python docs/hooks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(DEV)  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

format: $(DEV)  ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## delete the virtual environment and the files of tools
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis site dist build

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
