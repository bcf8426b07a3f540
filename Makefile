# The one door to everything that is run on this repository.
#
#   make PYTHON=/path/to/python venv    build the environment with that interpreter
#   make PY=python test                 use an environment that exists already
#                                       (a GPU machine with its own torch, say)
#   make JOBS=1 test                    run the tests in that many processes

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

VENV ?= .venv
STAMP := $(VENV)/.installed

# An environment of the user's own is taken as it is; ours is built on demand.
ifdef PY
READY :=
else
PY := $(VENV)/bin/python
READY := $(STAMP)
endif

# Where public names are defined: the faces, and the rooms' modules that they take some from.
PUBLIC = linearize/*.py linearize/scipy/*.py linearize/sparse/*.py linearize/_capture/registered.py \
  linearize/_derivatives/blocks.py linearize/_inspect/kept.py linearize/_inspect/summary.py \
  linearize/_points/closures.py linearize/_points/jacobian.py linearize/_points/linearization.py \
  linearize/_points/linearizer.py linearize/_points/memo.py linearize/_spaces/gmres.py \
  linearize/_spaces/joins.py linearize/_spaces/operators.py

# Tests of one file share a process: code blocks of a page build on each other. Files come in the
# order of conftest.py. Without pytest-xdist (an environment of the user's own) they run one after
# the other.
JOBS ?= auto
WORKERS = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo '-n $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder')

IS_SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11))
say = @printf '\n==> %s\n' '$(1)'

.PHONY: help venv demo examples test test-slow test-packages soak bench conformance check format-check lint layering types docs format clean

help: ## show this list
	@echo 'Usage: make TARGET'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(READY) ## create .venv and install the package with its tools
	@echo 'The environment is ready: $(PY)'

# Interpreters are tried by running them: a name on the PATH proves nothing.
$(STAMP): pyproject.toml constraints-dev.txt
	$(call say,Creating the environment in $(VENV))
	@if [ ! -x $(VENV)/bin/python ]; then \
	  found=''; \
	  for name in $(or $(PYTHON),python3 python python3.14 python3.13 python3.12 python3.11); do \
	    if "$$name" -c '$(IS_SUPPORTED)' >/dev/null 2>&1; then found="$$name"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'Python 3.11 or later is needed, and none was found ($(or $(PYTHON),tried python3, python, python3.11 to python3.14)).' >&2; \
	    echo 'Install one, or name it: make PYTHON=/path/to/python3 venv' >&2; \
	    exit 1; \
	  fi; \
	  "$$found" --version; \
	  "$$found" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	@$(VENV)/bin/python -c '$(IS_SUPPORTED)' || { \
	  echo '$(VENV) was made with a Python older than 3.11; remove it and try again.' >&2; exit 1; }
	$(call say,Installing linearize and its tools (torch is large; this can take minutes))
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints-dev.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## fit the NIST regression problems and plot the fits
	$(call say,Fitting the NIST regression problems)
	$(PY) examples/nist_regression.py

examples: $(READY) ## run all examples in full (minutes), write outputs and pictures into the page
	$(call say,Running the examples)
	$(PY) examples/run_all.py --docs docs/examples.md $(ARGS)

test: $(READY) ## run the tests and the code blocks of README and docs
	$(call say,Running the tests)
	$(PY) -m pytest -m 'not slow' $(WORKERS)

test-slow: $(READY) ## run the tests that take minutes
	$(call say,Running the slow tests)
	$(PY) -m pytest -m slow

test-packages: $(READY) ## try the custom Functions and models of other packages
	$(call say,Installing the packages)
	$(PY) -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints-dev.txt --editable '.[packages]'
	$(call say,Running the tests of other packages)
	$(PY) -m pytest tests/packages
	$(call say,Writing the table)
	$(PY) -W ignore tools/try_packages.py --docs docs/packages.md

soak: $(READY) ## make 10^5 points and 10^6 products, see that memory is flat (minutes)
	$(call say,Soaking)
	$(PY) tools/soak.py --docs docs/soak.md $(ARGS)

# ARGS='--rounds 20 --only Burgers' and the like; ARGS='--resume' goes on where a run was cut off,
# ARGS='--help' lists the options. JAX takes part if it is installed: pip install -e '.[bench]'.
bench: $(READY) ## time the products against their peers (minutes), write table, JSON, plot
	$(call say,Running the benchmarks)
	$(PY) -m benchmarks.run --docs docs/benchmarks.md $(ARGS)
	$(if $(ARGS),,$(PY) -m benchmarks.outer --docs docs/benchmarks.md)
	$(if $(ARGS),,$(PY) -m benchmarks.front && $(PY) -m benchmarks.choice)

# Goes on where it was cut off; ARGS='--fresh' begins anew, ARGS='--help' lists the options.
conformance: $(READY) ## compare every operator of PyTorch's database (minutes), write the page
	$(call say,Running the conformance suite)
	PYTHONPATH=tools $(PY) -m conformance $(ARGS)

# The tests come last, so that their closing line is the last thing seen.
check: format-check lint layering types docs demo test ## run everything that must pass before a change goes in

format-check: $(READY) ## check the formatting
	$(call say,Checking the formatting)
	$(PY) -m ruff format --check .

lint: $(READY) ## lint code and docstrings
	$(call say,Linting)
	$(PY) -m ruff check .
	$(PY) -m numpydoc lint $(PUBLIC)

layering: $(READY) ## check which module imports which
	$(call say,Checking the layering of the modules)
	$(PY) tools/layering.py

types: $(READY) ## check the types of the package, strictly
	$(call say,Checking the types)
	$(PY) -m mypy

docs: $(READY) ## build the documentation; a warning is an error
	$(call say,Building the documentation)
	$(PY) -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -b html docs docs/_build/html
	@echo 'Written to docs/_build/html/index.html'

format: $(READY) ## format the code and mend what the linter can mend
	$(call say,Formatting)
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .

clean: ## remove what was built, but not .venv
	$(call say,Removing build products and caches)
	rm -rf build dist benchmarks/out examples/out docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
