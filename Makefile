# Everything runs from .venv, made by the first target that needs it. PYTHON=… chooses another interpreter (3.11 or 3.12).
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# An installation is remembered by the content of what was asked for, so that a repeated target costs nothing.
ASKED := $(shell cat pyproject.toml infra/constraints.txt | cksum | cut -d' ' -f1)
DEMO_READY := .venv/ready-demo-$(ASKED)
TEST_READY := .venv/ready-test-$(ASKED)
# Two files beside each other, in the order given: long ones first, so that no core is idle at the end.
PYTEST := $(BIN)/python -m pytest --durations=20 -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo install test test-all chaos lint bench bench-plan constraints clean

help:
	@echo "make demo       the whole pipeline on real images: shows where everything is"
	@echo "make test       lint, types and the test suite (at most 15 minutes on 2 cores)"
	@echo "make test-all   the long acceptance tests too (about 70 minutes on 2 cores)"
	@echo "make chaos      kills each part of a running stack, and reports what became of the work (about 50 minutes)"
	@echo "make lint       ruff, import rules and mypy alone"
	@echo "make bench      speed of training and sampling beside diffusers"
	@echo "make bench-plan how near 'diffusion plan' comes to what the digits take (about 10 minutes)"
	@echo "make install    .venv with everything that the targets above need"

demo: $(DEMO_READY)
	$(BIN)/diffusion demo

install: $(TEST_READY)

test: lint
	$(PYTEST) tests/unit
	$(PYTEST) tests/integration tests/faults

test-all: lint
	$(PYTEST) -m "not benchmark" tests/unit
	$(PYTEST) -m "not benchmark" tests/acceptance tests/faults tests/integration

chaos: $(TEST_READY)
	$(BIN)/python -m tests.chaos

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

bench: $(TEST_READY)
	$(BIN)/python -m tests.benchmarks.against_diffusers

bench-plan: $(TEST_READY)
	$(BIN)/python -m tests.benchmarks.plan_accuracy --preset digits

# Resolves everything anew and pins what came out. torch keeps its pin: another build could pull gigabytes of CUDA.
constraints:
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/pip install "$$(grep '^torch==' infra/constraints.txt)" -e '.[test,lint,bench,kubernetes]'
	head -n 1 infra/constraints.txt > build/constraints/pins.txt
	build/constraints/bin/pip freeze --exclude-editable | sed 's/+cpu$$//' >> build/constraints/pins.txt
	mv build/constraints/pins.txt infra/constraints.txt && rm -rf build/constraints

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find diffusion_core flows tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and none was found; install it or call make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "The virtual environment could not be made; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(DEMO_READY): .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e .
	@rm -f .venv/ready-demo-* && touch $@

$(TEST_READY): .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '.[test,lint,bench,kubernetes]'
	@rm -f .venv/ready-* && touch $@ $(DEMO_READY)
