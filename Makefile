# The two commands that a newcomer needs: bash examples/quickstart.sh, and make test.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# A machine without a GPU stays on one CPU build of torch; with one, pip chooses the CUDA build.
CONSTRAINTS := $(shell command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1 || echo -c constraints-cpu.txt)

# Two test files at a time, each on one thread: what the default machine has.
PYTEST_ARGS ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install test test-full lint format clean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(VENV)/.installed: pyproject.toml setup.py constraints-cpu.txt $(wildcard csrc/*.* csrc/*/*.*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v <= (3, 13) else "error: PYTHON=$(PYTHON) is Python %d.%d; use 3.11, 3.12 or 3.13" % v)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(CONSTRAINTS) torch
	$(PIP) install -q "setuptools>=77" wheel ninja pybind11
	$(PIP) install -q $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	@$(PY) setup.py -q build_ext --inplace  # compiles nothing again; pip keeps its one line to itself
	touch $@

install: $(VENV)/.installed ## Create the virtual environment and install the package with its tools

test: install ## Run the tests (under 15 minutes on 2 cores)
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

test-full: install ## Run the slow tests too
	$(PY) -m pytest $(PYTEST_ARGS)

lint: install ## ruff, mypy, shellcheck, and clang-format on csrc
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x examples/*.sh examples/slurm/* benchmarks/*.sh .ci/run
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.h')

format: install ## Format Python and C++ sources in place
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.h')

clean: ## Remove build products and the quickstart's output (not the virtual environment)
	rm -rf build dist quickstart .pytest_cache .mypy_cache .ruff_cache
