# make demo | make test | make ui: each installs what it needs first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LITERT := .venv-litert
QUIETLY := --quiet --disable-pip-version-check
# Older ones do not see that sqlalchemy==2.0.58 pins sqlalchemy[asyncio], too.
PIP := 'pip>=23.3'
# A plain path: setuptools' finder loses to a folder named kd, such as a clone's, where Python starts.
EDITABLE := --config-settings editable_mode=compat --editable
RESOLVE := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header

# dvc.yaml says `python`: the environment's own must come first, also where it is not activated.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := true

.PHONY: help install litert demo test test-slow lint types contracts check coverage ui stack stack-status stack-stop lock clean

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## The environment, from the lock file

$(INSTALLED): requirements.lock pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: make needs Python 3.11 with venv; name it by PYTHON=..."; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name it by PYTHON=..."; rm -rf $(VENV); exit 1; }
	@echo "installing the locked dependencies into $(VENV): 7 GB, a few minutes the first time"
	@$(BIN)/python -m pip install $(QUIETLY) $(PIP)
	@$(BIN)/python -m pip install $(QUIETLY) --require-hashes -r requirements.lock
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install $(QUIETLY) --no-deps --no-build-isolation $(EDITABLE) .
	@mkdir -p .kd/prefect && PREFECT_HOME="$$PWD/.kd/prefect" \
	  PREFECT_API_DATABASE_CONNECTION_URL="sqlite+aiosqlite:///$$PWD/.kd/prefect/prefect.db" \
	  $(BIN)/prefect server database upgrade --yes > .kd/prefect.log
	@touch $@

litert: install $(LITERT)/.installed  ## What exports to LiteRT need besides: an environment of its converter

$(LITERT)/.installed: requirements-litert.lock
	@test -x $(LITERT)/bin/pip || $(PYTHON) -m venv --clear $(LITERT)
	@echo "installing LiteRT's converter into $(LITERT): 7 GB"
	@$(LITERT)/bin/python -m pip install $(QUIETLY) $(PIP)
	@$(LITERT)/bin/python -m pip install $(QUIETLY) --require-hashes -r $<
	@touch $@

demo: install  ## The whole pipeline on the embedded data, then its table
	@python -m flows.pipeline

test: install  ## The tests, but for the slow ones
	python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: install  ## The slow tests
	python -m pytest -m slow --numprocesses 2 --dist loadfile

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

stack: install  ## PostgreSQL, Prefect, MLflow and a worker, in the background (infra/stack.env)
	@python -m flows.stack start

stack-status: install  ## What of the stack runs, and where
	@python -m flows.stack status

stack-stop: install  ## End the stack; its data stays
	@python -m flows.stack stop

lock: install  ## Resolve pyproject.toml again, keeping present pins where they fit
	python -m pip install --quiet uv
	$(RESOLVE) pyproject.toml --all-extras --output-file requirements.lock
	$(RESOLVE) --group litert --output-file requirements-litert.lock

# Younger files may be in use, and a lock always: by a flow, a comparison or a `dvc repro`.
clean:  ## Drop checkpoints and cached targets that were not used for an hour; all else stays
	@for each in .kd .kd/compare/*/*/.kd; do for kind in checkpoints targets; do \
	  test ! -d "$$each/$$kind" || \
	    find "$$each/$$kind" -type f ! -name '*.lock' -mmin +60 -delete || exit 1; \
	done; done
