# HighRes-LowRAM. `make` alone lists what there is.
#
# Everything lives in .venv and is installed again only when pyproject.toml or constraints.txt change. pip's own settings
# apply (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...): that is where the CPU build of torch is chosen on Linux.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALL = $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt
TESTS ?= tests
# processes that test side by side, one more than cores as many wait for others; 0: one alone
WORKERS ?= 3

# The prompt is text: it goes through the environment as it was typed, past make's and the shell's own grammar.
override PROMPT := $(value PROMPT)
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help run test test-fast slow check format bench clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

run: $(VENV)/.run ## a picture: make run PROMPT="a lighthouse on a cliff" ARGS="width=1024 height=1024 seed=3"
	@$(PY) runner.py stage=all $${PROMPT:+"prompt=$$PROMPT"} $(ARGS)

test: $(VENV)/.dev ## the tests, without the slow ones (but with the headline): make test TESTS=tests/unit
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=60 --durations-min=6 -m "not slow or ci_slow" $(TESTS)

test-fast: $(VENV)/.dev ## the tests that need no torch, in half a minute
	@$(PY) -m pytest -n $(WORKERS) -m fast $(TESTS)

slow: $(VENV)/.dev ## the slow tests: full-size models, large canvases
	@$(PY) -m pytest -m slow $(TESTS)

check: $(VENV)/.dev ## ruff (lint and format) and pyright
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/pyright

format: $(VENV)/.dev ## let ruff format and fix what it can
	@$(VENV)/bin/ruff check --fix-only -q .
	@$(VENV)/bin/ruff format .

bench: $(VENV)/.dev ## the list of benchmarks, or one: make bench BENCH=random_checkpoint ARGS="sd15 DIR"
	@$(PY) -m benchmarks $(BENCH) $(ARGS)

clean: ## remove .venv and caches (outputs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed, got " + sys.version.split()[0] + ": make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make environments: install its venv package (python3-venv on Debian and Ubuntu)"; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(PY)
	@echo "Installing (a few minutes the first time) ..."
	@$(INSTALL) -e ".[openvino]" || { echo "Without OpenVINO, for which this machine may have no wheel ..."; $(INSTALL) -e .; }
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(PY)
	@echo "Installing with the tools for tests and checks (a few minutes the first time) ..."
	@$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.run
