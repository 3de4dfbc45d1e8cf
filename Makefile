# `make demo` and `make test` each need nothing but Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test matrix lint clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): requirements.txt requirements-public.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-public.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $(READY)

demo: $(READY) ## run the main job: public models, eager, Inductor and lightning
	$(BIN)/python examples/quickstart.py

test: $(READY) ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

matrix: $(READY) ## run all public programs and write docs/support-matrix.md
	$(BIN)/python -m tests.models

lint: $(READY) ## formatting, types and the import contracts
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

clean: ## remove the environment
	rm -rf $(VENV)
