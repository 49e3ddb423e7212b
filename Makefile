# pocketfed: everything a developer runs. `make` alone lists the targets.
#
# Set-up is a chain of stamp files inside .venv whose names carry a hash of what they depend on (interpreter,
# pyproject.toml, native sources): a stamp that exists is current, whatever its time, so `make setup` is a no-op
# after a fresh `git checkout` of the same content and each link is rebuilt alone when its own inputs change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# --- what a user may set ---------------------------------------------------------------------------------------

# Interpreter that creates .venv: the first one >= 3.11 that can make virtual environments.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# More arguments for the torch install, e.g. the index option that selects PyTorch's CPU wheels.
TORCH_INSTALL_ARGS ?=
# Processes that pytest uses.
PYTEST_WORKERS ?= 2
# More arguments for pytest, e.g. PYTEST_ARGS='-k frames'.
PYTEST_ARGS ?=
# More arguments for the fuzzer of the parsers.
FUZZ_ARGS ?=
# Where `make demo` writes.
DEMO_OUT ?= runs/demo
# Where `make robustness` keeps its study.
ROBUSTNESS_OUT ?= runs/robustness
# Where `make frontier` keeps finished cells.
FRONTIER_OUT ?= runs/frontier
# Where `make personalization` keeps finished cells.
PERSONALIZATION_OUT ?= runs/personalization

# --- names -----------------------------------------------------------------------------------------------------

ROBUSTNESS_RULES := mean,krum,multi-krum,trimmed-mean,median,geometric-median,centered-clipping,bulyan,nnm+krum,nnm+trimmed-mean
PACKAGES := client_sdk server_ref mobile_export simulator
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# -qq hides pip's chatter and keeps its errors.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH_PIN := $(shell grep -owm1 'torch==[0-9.]*' pyproject.toml)
NATIVE_SOURCES := $(sort $(wildcard client_sdk/native/*.py client_sdk/native/*.cpp client_sdk/native/*.h client_sdk/native/*.map))

hash = $(shell { $(1); } 2>/dev/null | sha256sum | cut -c1-16)
VENV_KEY := $(call hash,$(PYTHON) -VV; pwd)
TORCH_KEY := $(call hash,echo $(VENV_KEY) $(TORCH_PIN))
# Of pyproject.toml only what an installation depends on: the linters' settings need no new one.
DEPS_KEY := $(call hash,echo $(TORCH_KEY); awk '/^\[/ { kept = /^\[(build-system|project|tool.setuptools)/ } kept' pyproject.toml)
# The compiler is part of the key: once one is installed, the next set-up compiles the shim.
NATIVE_KEY := $(call hash,echo $(DEPS_KEY); command -v c++ g++ clang++; cat $(NATIVE_SOURCES) /dev/null)

VENV_STAMP := $(STAMPS)/venv-$(VENV_KEY)
TORCH_STAMP := $(STAMPS)/torch-$(TORCH_KEY)
DEPS_STAMP := $(STAMPS)/deps-$(DEPS_KEY)
NATIVE_STAMP := $(STAMPS)/native-$(NATIVE_KEY)

# Replace the older stamps of one kind by the new one.
stamp = rm -f $(STAMPS)/$(1)-* && touch $@

.PHONY: help setup demo test test-slow check format bench bench-large bench-leak sanitize fuzz robustness private frontier personalization audit docs clean distclean

help: ## list the targets
	@echo 'pocketfed: make TARGET'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' Makefile

# --- set-up ----------------------------------------------------------------------------------------------------

setup: $(NATIVE_STAMP) ## create .venv with everything (a few minutes; a no-op when current)
	@echo 'setup: .venv is current'

$(VENV_STAMP):
	@test -n '$(PYTHON)' || { echo 'setup: no Python >= 3.11 with the venv module was found; install one, or name it: make setup PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'setup 1/4: new virtual environment in .venv ($(PYTHON), some seconds)'
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && mkdir -p $(STAMPS) && touch $@

# torch alone and without its dependencies first: should this turn out to be a CUDA build, it is refused before
# pip would fetch the gigabytes of CUDA libraries that it asks for.
$(TORCH_STAMP): $(VENV_STAMP)
	@echo 'setup 2/4: $(TORCH_PIN), CPU build (about half a minute plus the download)'
	@$(PIP) install --no-deps $(TORCH_INSTALL_ARGS) '$(TORCH_PIN)'
	@$(BIN)/python -c "$$CHECK_CPU_BUILD" || { $(PIP) uninstall -y torch; exit 1; }
	@$(call stamp,torch)

$(DEPS_STAMP): $(TORCH_STAMP)
	@echo 'setup 3/4: ExecuTorch, the packages and the development tools (one to two minutes plus the download)'
	@$(PIP) install $(TORCH_INSTALL_ARGS) -e '.[dev]'
	@$(call stamp,deps)

$(NATIVE_STAMP): $(DEPS_STAMP)
	@echo 'setup 4/4: compiling the native libraries: the ExecuTorch shim, the sharing kernels (about ten seconds)'
	@if $(BIN)/python -m client_sdk.native.build >/dev/null; then $(call stamp,native); else \
	  echo 'setup: no native libraries (the reason is above). Everything works without them: devices use the official' >&2; \
	  echo 'setup: ExecuTorch bindings, which load torch (about 290 MiB a process instead of 80), and split updates into' >&2; \
	  echo 'setup: shares with numpy, which takes longer. To get them, mend the cause and run make setup again.' >&2; fi

define CHECK_CPU_BUILD
import importlib.util, pathlib, runpy, sys
folder = pathlib.Path(importlib.util.find_spec("torch").origin).parent
cuda = runpy.run_path(str(folder / "version.py")).get("cuda")
if cuda is not None:
    sys.exit(
        f"setup: the torch that pip found is a CUDA {cuda} build, several gigabytes with its libraries, and pocketfed "
        "uses none of it.\nsetup: point pip at PyTorch's CPU wheel index: "
        "make setup TORCH_INSTALL_ARGS='--index-url <PyTorch CPU wheel index>' (see README.md, Set-up)."
    )
endef
export CHECK_CPU_BUILD

# --- the two commands of the README ----------------------------------------------------------------------------

demo: setup ## train a digit classifier on a simulated fleet of 100 devices, and write a report
	@$(BIN)/pocketfed simulate --dataset digits --devices 100 --partition dirichlet:0.5 --model mlp --rounds 100 --seed 1 --out $(DEMO_OUT) --overwrite
	@echo 'demo: open $(CURDIR)/$(DEMO_OUT)/report.html'

# Long tests stand next to one another: a worker that has none left takes over from the other.
test: setup ## run the test suite
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal -m 'not slow' $(PYTEST_ARGS)

# --- the rest --------------------------------------------------------------------------------------------------

test-slow: setup ## run the long scenarios that `make test` leaves out
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: setup ## lint, formatting, types, import contracts, links in the docs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest -q tests/unit/test_docs.py

sanitize: setup ## build the native code with ASan, UBSan and TSan, and run it against wrong calls and damaged programs
	@$(BIN)/python tests/fuzz/sanitize.py

fuzz: setup ## feed damaged bytes to every parser (some minutes; FUZZ_ARGS='--cases 100000')
	@$(BIN)/python -m tests.fuzz.fuzz $(FUZZ_ARGS)
	@$(BIN)/python tests/fuzz/sanitize.py --only address --programs 5000

format: setup ## rewrite the sources in the house format
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

bench: setup ## run the benchmarks one after another (an hour), and make docs/benchmarks.md of what they print
	@$(BIN)/python tests/benchmarks/collect.py $(BENCHES)

bench-large: setup ## aggregate 100 million parameters, and judge the memory (2.6 GB)
	@$(BIN)/python tests/benchmarks/bench_large.py --large --check

bench-leak: setup ## aggregate 20,000 rounds in one process, and judge the memory
	@$(BIN)/python tests/benchmarks/bench_large.py --leak --check

robustness: setup ## rules against attacks on digits (some minutes; goes on where it stopped), into docs/robustness-table.md
	@$(BIN)/pocketfed robustness --rules $(ROBUSTNESS_RULES) --seeds 1,2 --out $(ROBUSTNESS_OUT)
	@cp $(ROBUSTNESS_OUT)/robustness-table.md docs/ && cp $(ROBUSTNESS_OUT)/img/robustness*.svg docs/img/
	@echo 'robustness: open $(CURDIR)/$(ROBUSTNESS_OUT)/report.html'

private: setup ## what epsilon = 1 costs on Fashion-MNIST with 12,000 devices (some minutes), into docs/private-accuracy.md
	@$(BIN)/pocketfed data fashion-mnist
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/benchmarks/study_private.py

frontier: setup ## privacy against attackers: accuracy by budget and part of the fleet (a quarter of an hour; goes on where it stopped)
	@$(BIN)/pocketfed data fashion-mnist
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m simulator.frontier --kept $(FRONTIER_OUT)/cells.jsonl --out docs/frontier-summary.md --picture docs/img/frontier.svg

personalization: setup ## what personalisation gives, algorithm by algorithm (some 25 minutes; goes on where it stopped)
	@$(BIN)/pocketfed data fashion-mnist
	@$(BIN)/pocketfed data manpages
	@OPENBLAS_NUM_THREADS=1 $(BIN)/python -m simulator.personal_study --kept $(PERSONALIZATION_OUT)/cells.jsonl --out docs/personalization-figures.md --pictures docs/img

audit: setup ## try to refute the claimed privacy (some minutes), into docs/audit-summary.md
	@OPENBLAS_NUM_THREADS=1 $(BIN)/pocketfed audit --out docs/audit-summary.md

docs: setup ## build the API reference into build/docs from the docstrings, and check the links of docs/
	@$(BIN)/pdoc --docformat google --output-directory build/docs $(PACKAGES)
	@$(BIN)/python -m pytest -q tests/unit/test_docs.py
	@echo 'docs: start at docs/README.md; API reference in build/docs/index.html'

clean: ## remove caches, build products and the demo's output (keeps .venv)
	@rm -rf build dist *.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache $(DEMO_OUT)
	@find $(PACKAGES) tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## as clean, and remove .venv
	@rm -rf $(VENV)
