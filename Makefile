# Everything that one does with this checkout. `make` alone lists it.

VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
BUILD_INPUTS := pyproject.toml $(wildcard tools/build_kernels.py src/cloudsave/kernels/*.[ch])
PATHS  := src tests tools $(wildcard benchmarks)
# How tests are run; PARALLEL= runs them one after the other in one process.
PARALLEL ?= -n auto --dist worksteal
# What `make simulate` begins with, and how many histories it plays.
SEED  ?= 1
SEEDS ?= 1000
PYTEST := $(PY) -m pytest $(PARALLEL)

.DEFAULT_GOAL := help
.PHONY: help demo check lint test integration faults simulate fuzz bench docs

help: ## list these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed-demo ## back up an embedded PostgreSQL under load, lose a table, bring it back
	$(VENV)/bin/cloudsave demo

check: lint ## what to run before each commit: linters, types, layers, quick tests (under 2 minutes)
	$(PYTEST) -q tests/unit tests/tidy tests/contracts

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check $(PATHS)
	$(VENV)/bin/ruff format --check $(PATHS)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: lint servers ## everything, on every supported version of every engine
	$(PYTEST) --require-all-engines

integration: servers ## tests on real servers; narrow by ARGS="--postgresql=15,18 -k name"
	$(PYTEST) tests/integration $(ARGS)

faults: servers ## play every fault of docs/reliability.md, print how each ended; ARGS as above
	$(PYTEST) tests -m fault --fault-table --postgresql=14,18 $(ARGS)

simulate: $(VENV)/.installed-test ## play simulated histories: make simulate SEED=1 SEEDS=1000; one of them: SEEDS=1
	$(PY) -m tests.simulation.histories --seed $(SEED) --seeds $(SEEDS) $(if $(filter 1,$(SEEDS)),--tell)

fuzz: $(VENV)/.installed-test ## each parser against mutated bytes for SECONDS=60
	CLOUDSAVE_FUZZ_SECONDS=$(or $(SECONDS),60) $(PYTEST) tests/fuzz --timeout=0

bench: servers ## measure ourselves and the peers on the same data, in turns
	$(PY) tools/provision.py --peers
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(PY) $$file $(ARGS); done

docs: $(VENV)/.installed-test ## check the documents against the code, and show the coming changelog
	$(PY) -m pytest -q tests/tidy -k "documented or docs or changelog"
	$(VENV)/bin/towncrier build --draft --version next

.PHONY: servers
servers: $(VENV)/.installed-test
	$(PY) tools/provision.py
	$(PY) -m tools.provision_binlog

# ---- the virtual environment; stamp files say what is installed in it --------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "cloudsave needs Python 3.11 or later; name one by: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(MAKE) --no-print-directory python-venv
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'

$(VENV)/.installed-demo: $(BUILD_INPUTS) | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/.installed-test: $(BUILD_INPUTS) | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check --group test --editable '.[demo]'
	@touch $@ $(VENV)/.installed-demo

# Debian ships Python without ensurepip. Root may have it installed; anyone else is told what to ask for.
.PHONY: python-venv
python-venv:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing python3-venv, which Debian ships apart from Python"; \
	  apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y python3-venv; \
	else \
	  echo "Python's venv module is missing; on Debian or Ubuntu: sudo apt-get install python3-venv" >&2; \
	  exit 1; \
	fi
