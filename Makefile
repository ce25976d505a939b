# Every target prepares what it needs. An active virtual or conda environment is used as it is, and a
# torch >= 2.11 found there is kept; otherwise .venv is created. `make help` lists the targets.
#
# Variables:
#   PYTHON           the interpreter that .venv is made from (3.10 to 3.13)
#   TORCH            what to install where torch is missing
#   TORCH_INDEX_URL  a package index to look for torch in besides pip's own, such as that of torch's CPU builds
#   ARGS             more arguments for the command that the target runs
#   ALRAO_CUDA, TORCH_CUDA_ARCH_LIST, ...  see the head of setup.py

SHELL := /bin/sh
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
BIN := $(ENV)/bin
# A file that is as old as the environment itself.
BORN := $(ENV)/$(if $(VIRTUAL_ENV),pyvenv.cfg,$(if $(CONDA_PREFIX),conda-meta/history,pyvenv.cfg))
# Stamps stand in the clone, not in the environment: one environment may serve several clones.
STAMPS := build/make/$(subst /,-,$(ENV))
# A bare `torch` brings gigabytes of CUDA libraries along, so without a GPU the version is pinned to one that also
# comes as a CPU build.
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),torch>=2.11,torch==2.13.0)
CPP = $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cuh" -o -name "*.cu")

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(STAMPS)/demo kernels ## train on scikit-learn's digits: Alrao against a grid of learning rates; table and plots
	$(BIN)/python benchmarks demo $(ARGS)

.PHONY: speed
speed: $(STAMPS)/bench kernels ## time every op and training steps beside what else does the same
	$(BIN)/python benchmarks speed $(ARGS)

.PHONY: bench
bench: $(STAMPS)/bench kernels ## the quick benchmarks and their report, 6 minutes on 2 cores; started again it goes on
	$(BIN)/python benchmarks speed --preset quick --no-memory
	$(BIN)/python benchmarks quality --quick
	$(BIN)/python benchmarks paper table2
	$(BIN)/python benchmarks paper figure4 --quick --models lstm-chars
	$(BIN)/python benchmarks report

# As many workers as CPUs; tests in the order of tests/conftest.py, those of one xdist_group on one worker.
PYTEST = $(BIN)/pytest -n auto --dist loadgroup --no-loadscope-reorder

.PHONY: test
test: $(STAMPS)/test kernels ## the test suite without what is marked slow; ARGS="-k switch" for a part
	$(PYTEST) $(ARGS)

.PHONY: test-all
test-all: $(STAMPS)/test kernels ## every test: all kernels in every emulated, sanitized and interpreted run; 2 hours
	$(PYTEST) -m "" $(ARGS)

# Of an environment that is used as it is, found without a network: nothing is installed.
ANY_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(or $(PYTHON),python3))

.PHONY: gpu-check
gpu-check: ## on a GPU machine: build, tests, compute-sanitizer, speed, into a result file; installs nothing
	@$(ANY_PYTHON) benchmarks gpu_check $(ARGS)

.PHONY: gpu-status
gpu-status: ## whether the results of a GPU are those of the present sources, and what changed since
	@$(ANY_PYTHON) benchmarks gpu_status $(ARGS)

.PHONY: lint
lint: $(STAMPS)/dev ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

.PHONY: format
format: $(STAMPS)/dev ## apply ruff's and clang-format's corrections
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

.PHONY: docs
docs: $(STAMPS)/docs ## the documentation as a site, in build/site; a broken link or a missing docstring fails
	$(BIN)/python -m mkdocs build

.PHONY: doctor
doctor: $(STAMPS)/build kernels ## what runs here, and why not what does not
	$(BIN)/python -m alrao_fast doctor $(ARGS)

.PHONY: ptxas
ptxas: $(STAMPS)/test ## compile the CUDA kernels for every architecture, without a GPU, and print their registers
	$(BIN)/python tests/cuda_machine_code.py

.PHONY: build
build: $(STAMPS)/build kernels ## install the package in place and compile its kernels

.PHONY: wheel
wheel: $(STAMPS)/build ## make a wheel in dist/
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

.PHONY: clean
clean: ## remove everything that was built, but not .venv and not results/
	rm -rf build dist *.egg-info alrao_fast/*.so alrao_fast/_build_info.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Not a stamp: with nothing changed this takes a second, and it notices another torch as well as another source.
.PHONY: kernels
kernels:
	@$(BIN)/python setup.py --quiet build_ext --inplace

# $(STAMPS)/demo is the project with the extra [demo], and so on; "build" is the project alone.
$(STAMPS)/%: pyproject.toml setup.py toolchain.py $(STAMPS)/torch
	@# What an extra asks for must not exchange the torch that is there.
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >$(STAMPS)/constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -c $(STAMPS)/constraints.txt \
		-e ".$(if $(filter-out build,$*),[$*])"
	@touch $@

# torch stands in the command either way, so that pip heeds what it asks of setuptools.
$(STAMPS)/torch: $(BORN)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@torch='$(TORCH)'; \
	if $(BIN)/python -c 'import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 11)' 2>/dev/null; \
	then torch='torch>=2.11'; fi; \
	set -x; $(BIN)/python -m pip install "$$torch" "setuptools>=77" ninja \
		$(if $(TORCH_INDEX_URL),--extra-index-url "$(TORCH_INDEX_URL)")
	@mkdir -p $(STAMPS) && touch $@

.venv/pyvenv.cfg:
	@for python in $(PYTHON) $(if $(PYTHON),,python3 python3.13 python3.12 python3.11 python3.10); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
			set -ex; $$python -m venv .venv; exit; \
		fi; \
	done; \
	echo "No Python >= 3.10 found$(if $(PYTHON), as $(PYTHON)). Install one, or name it: make PYTHON=python3.12 ..."; exit 1
