# make demo | make test | make ui: each installs what it needs first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# dvc.yaml says `python`: the environment's own must come first, also where it is not activated.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := true

.PHONY: help install demo test test-slow lint types contracts check coverage ui lock clean

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## The environment, from the lock file

$(INSTALLED): requirements.lock pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: make needs Python 3.11 with venv; name it by PYTHON=..."; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name it by PYTHON=..."; rm -rf $(VENV); exit 1; }
	@echo "installing the locked dependencies into $(VENV): 7 GB, a few minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: install  ## The whole pipeline on the embedded data, then its table
	@python -m flows.pipeline

test: install  ## The tests, but for the slow ones
	python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: install  ## The slow tests
	python -m pytest -m slow

lint: install  ## Style
	ruff format --check .
	ruff check .

types: install  ## Types
	mypy

contracts: install  ## Imports go down only
	lint-imports

check: lint types contracts  ## All that needs no run

coverage: install  ## Lines and branches that the tests reach
	python -m pytest -m "not slow" --cov --cov-report=term

ui: install  ## MLflow and Prefect in the browser, until Ctrl-C
	@python -m flows.ui

lock: install  ## Resolve pyproject.toml again, keeping present pins where they fit
	python -m pip install --quiet uv
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --output-file requirements.lock

clean:  ## Forget runs, checkpoints and logs; artifacts and DVC's cache stay
	rm -rf .kd
