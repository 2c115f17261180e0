# `make demo` or `make test` is all that a fresh clone needs: each makes .venv, builds, and runs.
# A second call builds only what has changed. ARGS= is passed on to what is run.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
# Tests read one file of it, which needs no more than numpy and torch; the rest of it needs much.
PARITY := torch-uncertainty==0.13.0
CMAKE  ?= $(or $(shell command -v cmake),$(VENV)/bin/cmake)
JOBS   ?= $(shell nproc)

VENV        := .venv
PY          := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install -qq --disable-pip-version-check
INSTALLED   := $(VENV)/installed
# setup.py writes this file at the end of each build.
BUILT       := pyens/_C.build.json
CXX_FILES   := $(shell find csrc tests/cpp examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Ninja prints whole command lines: show the file that is compiled.
BUILD_EXT = setup.py -q build_ext --inplace | \
	sed -uE 's,^(\[[0-9]+/[0-9]+\]) .*[ /](csrc/\S+\.(cpp|cu)) .*,\1 \2,'

MAKEFLAGS     += --no-print-directory
SHELL         := bash
.SHELLFLAGS   := -o pipefail -ec
.DEFAULT_GOAL := help
.PHONY: help build demo test lint format kernels cpp template slow fuzz bench build-cuda test-cuda bench-cuda clean distclean FORCE

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: $(BUILT) ## make .venv and compile the extension in place

demo: $(BUILT) ## train an ensemble on real data and see what it knows and does not know
	$(PY) -m pyens.demo $(ARGS)

test: $(BUILT) ## run all Python tests
	$(PY) -m pytest $(ARGS)

lint: $(INSTALLED) ## check style and types: ruff, clang-format, mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy

format: $(INSTALLED) ## rewrite the sources in that style
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

kernels: $(filter $(VENV)/%,$(CMAKE)) ## kernels without torch: ctest under sanitizers, CUDA kernels run on the host and compiled where nvcc exists
	$(CMAKE) -S . -B build/kernels -DPYENS_SANITIZE=ON
	$(CMAKE) --build build/kernels --parallel $(JOBS)
	CTEST_OUTPUT_ON_FAILURE=1 CTEST_PARALLEL_LEVEL=$(JOBS) $(CMAKE) --build build/kernels --target test

cpp: $(BUILT) $(filter $(VENV)/%,$(CMAKE)) ## a C++ program without Python loads the operations and runs one
	$(CMAKE) -S tests/cpp/torch -B build/cpp -DCMAKE_PREFIX_PATH="$$($(PY) -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	$(CMAKE) --build build/cpp
	build/cpp/load_operations pyens/_operations.abi3.so

slow: $(BUILT) $(VENV)/peers ## what takes too long for each change: tests that need the peers, ten times the examples
	$(PY) -m pytest tests/test_benchmarks.py tests/test_benchmarks_engines.py $(ARGS)
	$(PY) -m pytest -m hypothesis --hypothesis-profile=slow $(ARGS)

fuzz: $(BUILT) ## the properties again with 5,000 examples each (hours)
	$(PY) -m pytest -m hypothesis --hypothesis-profile=fuzz $(ARGS)

template: $(BUILT) ## build and test the example operation of examples/gain
	$(PY) -m pytest examples/gain $(ARGS)

BENCHMARKS := ensemble_mlp training ensemble_conv2d networks fit decorrelation uncertainty masksembles activation_strength serving
# Of the CPU alone, with their options.
CPU_BENCHMARKS := sparse: int8: component_models: every_engine:--threads=1 every_engine:--threads=2 cost_curves:--rounds=5 contention: streaming:

bench: $(BUILT) $(VENV)/peers ## compare every operation with its peers
	for run in $(addsuffix :,$(BENCHMARKS)) $(CPU_BENCHMARKS); do \
		$(PY) -m benchmarks.$${run%%:*} $${run#*:} $(ARGS); done
	$(PY) -m benchmarks.results_page

# On a GPU machine: the interpreter that is already there, with its torch; nothing is installed.
# Only what a GPU can change: tests marked cuda, and what nvcc makes of the kernels.
SANITIZER = $(shell command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)

test-cuda: build-cuda ## build for CUDA with $(PYTHON) and run what needs a GPU; none skips for want of one
	PYENS_REQUIRE_CUDA=1 $(PYTHON) -m pytest -m cuda $(ARGS)
	$(PYTHON) -m pytest -rs tests/test_cuda_code.py
	@if [ -z "$(SANITIZER)" ]; then echo "compute-sanitizer: not found, so not run"; fi
	for run in $(if $(SANITIZER),memcheck: racecheck:float32 initcheck:float32 synccheck:float32); do \
		$(SANITIZER) --tool $${run%%:*} --error-exitcode 1 $(PYTHON) -m tests.cuda_operations $${run#*:}; done

bench-cuda: build-cuda ## build for CUDA with $(PYTHON) and run all benchmarks on the GPU
	for run in $(addsuffix :,$(BENCHMARKS)) ensemble_mlp:--precision=tf32 ensemble_mlp:--dtype=bfloat16; do \
		$(PYTHON) -m benchmarks.$${run%%:*} --device cuda $${run#*:} $(ARGS) || failed=1; done; exit $${failed:-0}

build-cuda:
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"torch {torch.__version__} of {sys.executable} finds no CUDA GPU here: there is nothing to run on")'
	@echo "building pyens._operations and pyens._C for CUDA"
	@PYENS_CUDA=1 $(PYTHON) $(BUILD_EXT)

clean: ## remove what was built
	rm -rf build *.egg-info pyens/_*.so $(BUILT)

distclean: clean ## and .venv
	rm -rf $(VENV)

$(BUILT): $(INSTALLED) $(filter csrc/%,$(CXX_FILES)) setup.py pyens/_version.py build/environment
	@echo "building pyens._operations and pyens._C"
	@$(PY) $(BUILD_EXT)

$(INSTALLED): $(VENV)/torch requirements-dev.txt
	@echo "setting up $(VENV): $(TORCH) and requirements-dev.txt (minutes, the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) '$(TORCH)' -r requirements-dev.txt
	@$(PIP_INSTALL) --no-deps --ignore-requires-python $(PARITY)
	@touch $@

# Holds the TORCH of the set-up, and is touched only when that changes.
$(VENV)/torch: FORCE
	@mkdir -p $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' >$@

# Holds what the environment says of the build, and is touched only when that changes.
build/environment: FORCE
	@mkdir -p build
	@env | LC_ALL=C sort | sed -nE '/^(PYENS_CUDA|CXX|C(PP|XX)?FLAGS|LDFLAGS|TORCH_CUDA_ARCH_LIST|CUDA_HOME)=/p' >$@.now
	@cmp -s $@.now $@ && rm $@.now || mv $@.now $@

# Without their dependencies: what they need of them is there, or in that list too.
$(VENV)/peers: $(INSTALLED) requirements-peers.txt
	@$(PIP_INSTALL) --no-deps -r requirements-peers.txt
	@touch $@

$(VENV)/bin/cmake: $(INSTALLED)
	@$(PIP_INSTALL) cmake==4.4.4
