# make demo | make test | make ui: each first installs what it needs.
# The first that runs: a shim of pyenv's is on the path even where its version is not active.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3; do \
  "$$each" -c "" 2> /dev/null && command -v "$$each" && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LITERT := .venv-litert
OLDEST := .venv-oldest
QUIETLY := --quiet --disable-pip-version-check
# Older versions do not see that sqlalchemy==2.0.58 pins sqlalchemy[asyncio], too.
PIP := 'pip>=23.3'
# Puts a plain path on sys.path: setuptools' import finder would lose to a folder named kd, such as
# a clone, in the folder where Python starts.
EDITABLE := --config-settings editable_mode=compat --editable
RESOLVE := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header

# dvc.yaml runs `python`: the environment's own must come first, even if it is not activated.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := true

.PHONY: help install litert demo test test-slow lint types contracts check test-oldest coverage ui stack stack-status stack-stop lock clean

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## Create the environment from the lock file

$(INSTALLED): requirements.lock pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: make needs Python 3.11 with venv; set PYTHON=... to its path"; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; set PYTHON=... to its path"; rm -rf $(VENV); exit 1; }
	@echo "installing the locked dependencies into $(VENV): 7 GB, a few minutes the first time"
	@$(BIN)/python -m pip install $(QUIETLY) $(PIP)
	@$(BIN)/python -m pip install $(QUIETLY) --require-hashes -r requirements.lock
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install $(QUIETLY) --no-deps --no-build-isolation $(EDITABLE) .
	@mkdir -p .kd/prefect && PREFECT_HOME="$$PWD/.kd/prefect" \
	  PREFECT_API_DATABASE_CONNECTION_URL="sqlite+aiosqlite:///$$PWD/.kd/prefect/prefect.db" \
	  $(BIN)/prefect server database upgrade --yes > .kd/prefect.log
	@touch $@

litert: install $(LITERT)/.installed  ## Create the separate environment that LiteRT's converter needs

.venv-%/.installed: requirements-%.lock
	@test -x $(@D)/bin/pip || $(PYTHON) -m venv --clear $(@D)
	@echo "installing $< into $(@D): 5 to 7 GB"
	@$(@D)/bin/python -m pip install $(QUIETLY) $(PIP)
	@$(@D)/bin/python -m pip install $(QUIETLY) --require-hashes -r $<
	@touch $@

demo: install  ## Run the whole pipeline on the embedded data, and show the results
	@python -m flows.pipeline

test: install  ## Run the tests, except the slow ones
	python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: install  ## Run the slow tests
	python -m pytest -m slow --numprocesses 2 --dist loadfile

lint: install  ## Check formatting and style
	ruff format --check .
	ruff check .

types: install  ## Check types
	mypy

contracts: install  ## Check that imports respect the layers
	lint-imports

check: lint types contracts  ## Run all static checks

test-oldest: $(OLDEST)/.installed  ## Run what needs the core alone, in the oldest versions allowed
	@PYTHONWARNINGS=ignore $(OLDEST)/bin/python -m pip install $(QUIETLY) --no-deps --no-build-isolation $(EDITABLE) .
	$(OLDEST)/bin/python -m pytest -m "not slow" -p tests.core_alone

coverage: install  ## Measure the tests' line and branch coverage
	python -m pytest -m "not slow" --cov --cov-report=term

ui: install  ## Serve MLflow and Prefect for the browser, until Ctrl-C
	@python -m flows.ui

stack: install  ## Start PostgreSQL, Prefect, MLflow and a worker in the background (infra/stack.env)
	@python -m flows.stack start

stack-status: install  ## Show which of the stack's programs run, and where
	@python -m flows.stack status

stack-stop: install  ## Stop the stack; its data stays
	@python -m flows.stack stop

lock: install  ## Resolve pyproject.toml again, keeping current pins where possible
	python -m pip install --quiet uv
	$(RESOLVE) pyproject.toml --all-extras --output-file requirements.lock
	$(RESOLVE) --group litert --output-file requirements-litert.lock
	$(RESOLVE) pyproject.toml --group oldest --resolution lowest-direct --output-file requirements-oldest.lock

# A flow, a comparison or a `dvc repro` may be using newer files, and lock files of any age.
clean:  ## Delete checkpoints and cached targets not used for an hour; all else stays
	@for each in .kd .kd/compare/*/*/.kd; do for kind in checkpoints targets; do \
	  test ! -d "$$each/$$kind" || \
	    find "$$each/$$kind" -type f ! -name '*.lock' -mmin +60 -delete || exit 1; \
	done; done
