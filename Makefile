# make env | demo | test-quick | test | test-slow | lint | format | docs | docs-serve | bench | gpu-test | clean
#
#   PYTHON           interpreter that the environment is made with (3.11, as the lock is)
#   TORCH_CPU_INDEX  where torch's CPU build is looked for when the configured package index lacks it
#   GPU_PYTHON       interpreter of the CUDA environment that gpu-test runs in (.venv holds the CPU one)
#   TEST_WORKERS     processes that make test and make test-quick spread the test files over
#   PYTEST_ARGS      further arguments for pytest, e.g. make test PYTEST_ARGS="tests/rewards -x"

PYTHON ?= $(shell python3.11 --version >/dev/null 2>&1 && echo python3.11 || echo python3)
PYTHON_VERSION := 3.11
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
GPU_PYTHON ?= python3
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
LOCKS := requirements/cpu.lock requirements/evaluation.lock requirements/trackers.lock requirements/dev.lock
# The stamps carry a checksum of what they were made from: a changed lock makes a new environment, a touched one does not.
LOCK_STAMP := $(VENV)/.lock-$(shell cat $(LOCKS) | cksum | cut -d' ' -f1)
PROJECT_STAMP := $(VENV)/.project-$(shell cat $(LOCKS) pyproject.toml | cksum | cut -d' ' -f1)
# The site has an environment of its own: it needs neither torch nor the package.
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.lock-$(shell cksum < requirements/docs.lock | cut -d' ' -f1)

# One thread a process: the processes of a run share the cores, and OpenMP threads that spin slow each other down.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help env demo test test-quick test-slow lint format docs docs-serve bench gpu-test clean

help:
	@sed -n 's/^# make //p' Makefile

env: $(PROJECT_STAMP)

$(LOCK_STAMP):
	@found=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') || found="nothing that runs"; \
	if [ "$$found" != "$(PYTHON_VERSION)" ]; then \
		echo "make env: PYTHON=$(PYTHON) is $$found, but requirements/cpu.lock is pinned for Python $(PYTHON_VERSION);" \
			"install it and say make env PYTHON=/path/to/python$(PYTHON_VERSION)" >&2; \
		exit 1; \
	fi
	$(PYTHON) -m venv --clear $(VENV)
	@torch=$$(grep '^torch==' requirements/cpu.lock); \
	$(BIN)/python -m pip install --quiet --no-deps "$$torch" || { \
		echo "make env: $$torch is not on the configured package index; trying $(TORCH_CPU_INDEX)"; \
		$(BIN)/python -m pip install --quiet --no-deps --index-url "$(TORCH_CPU_INDEX)" "$$torch"; \
	}
	$(BIN)/python -m pip install --quiet --no-deps $(LOCKS:%=-r %)
	@touch $@

# The metadata that setuptools leaves beside the package would be found a second time from the working directory.
$(PROJECT_STAMP): | $(LOCK_STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@rm -rf megatron_coreward.egg-info $(VENV)/.project-*
	@touch $@

demo: env
	$(BIN)/megatron-coreward demo

# Files are what workers are given (tests/conftest.py): a file, and an engine that several of them share, stay in one.
SPREAD = --numprocesses $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder

test: env
	$(BIN)/python -m pytest -m "not slow and not gpu" $(SPREAD) $(PYTEST_ARGS)

test-quick: env
	$(BIN)/python -m pytest --quick $(SPREAD) $(PYTEST_ARGS)

test-slow: env
	$(BIN)/python -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

gpu-test:
	$(GPU_PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(DOCS_STAMP):
	$(PYTHON) -m venv --clear $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --no-deps -r requirements/docs.lock
	@touch $@

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

docs-serve: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs serve

bench: env
	@set -e; for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python "$$bench"; done

clean:
	rm -rf $(VENV) $(DOCS_VENV) site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
