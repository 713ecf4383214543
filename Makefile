# Two commands do everything on a fresh Debian or Ubuntu machine with Python 3.11-3.13:
#   make demo                      clips -> shards -> pretraining (interrupted and resumed) -> evaluation
#   make demo CLIPS=my.csv         the same on your own files
#   make test                      the tests
# Further: make lint, make clean. PYTHON=python3.12 picks an interpreter; VENV=DIR another place.

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
CLIPS ?=
DEMO ?= demo
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder -q

.PHONY: demo test lint clean

demo: $(VENV)/.runtime
	$(BIN)/python -m avmae_jax.demo --output="$(DEMO)" $(if $(CLIPS),--clips="$(CLIPS)")

test: $(VENV)/.test
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_FLAGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'No Python 3.11, 3.12 or 3.13 was found: install one (apt-get install python3 python3-venv), or pass PYTHON=/path/to/python3.'; exit 1; }
	@# Debian ships Python without ensurepip; python3-venv brings it.
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); bash launch/install_venv.sh $(PYTHON) && $(PYTHON) -m venv $(VENV); }

$(VENV)/.runtime: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.test: setup.py constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,plan]'
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) $(DEMO) *.egg-info .pytest_cache .ruff_cache .mypy_cache
