# Every target makes what it needs first and can be run again.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help run test test-slow test-faults test-oldest lint benchmark wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was made from only if the installation went through.
$(VENV)/.installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-lint: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[lint]'
	@touch $@ $(VENV)/.installed

run: $(VENV)/.installed  ## train LeNet-5 on real digits and hold the result against its claim
	$(BIN)/zoo reproduce lenet/embedded

test: $(VENV)/.installed-test  ## the tests that run in minutes, on all processors
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

test-slow: $(VENV)/.installed-test  ## the tests that take longer
	$(BIN)/python -m pytest -m slow $(ARGS)

test-faults: $(VENV)/.installed-test  ## faults injected into runs, files and downloads
	$(BIN)/python -m pytest -n auto -m faults $(ARGS)

# SciPy and scikit-learn of that age have wheels up to Python 3.11: make test-oldest PYTHON=python3.11
test-oldest:  ## the quick tests, on the oldest versions that setup.cfg admits; in an environment of its own
	$(MAKE) PYTHON=$(PYTHON) VENV=.venv-oldest .venv-oldest/bin/python
	.venv-oldest/bin/pip install --quiet --constraint tests/oldest.txt --editable '.[test]'
	.venv-oldest/bin/python -m pytest -n auto --dist loadgroup $(ARGS)

lint: $(VENV)/.installed-lint  ## formatter, linter and type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmark: $(VENV)/.installed-test  ## images per second against a bare loop and the usual way
	$(BIN)/python benchmarks/small_images.py $(ARGS)
	$(BIN)/python benchmarks/classification.py

wheel: $(VENV)/.installed-test  ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## remove the environment and what was built
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
