# make quickstart   a virtual environment, the installation, and the whole pipeline on the embedded task
# make test         the same environment with the tools for development; lint, types, tests
#
# Where the package index serves torch for CUDA, and CUDA is not wanted:
#   make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: quickstart test lint clean

quickstart: $(VENV)/installed
	$(VENV)/bin/opdctl train --recipe recipes/quickstart.toml
	$(VENV)/bin/opdctl analyze-position runs/quickstart

test: lint
	$(VENV)/bin/pytest

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# torch goes first, in a version of its own: whoever asks for it later without a version may bring CUDA along.
$(VENV)/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opdctl needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
