# `make help` lists what there is. Everything runs in .venv, which `setup` makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.tools

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos check kafka docs bench clean

help:  ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do \
		printf '  make %-6s  %s\n' "$$name" "$$what"; done

setup: $(TOOLS)  ## make .venv with kser and everything the tests need

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "kser needs Python 3.11 or newer: there is no $(PYTHON) here"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "kser needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "making $(VENV) with kser ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
		echo "python3 -m venv failed. On Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(TOOLS): $(STAMP)
	@echo "installing the tools for tests and checks ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --group test --group lint
	@touch $@

demo: $(STAMP)  ## operations of three rolls on an embedded broker, from start to end
	@$(BIN)/kser demo

test: setup  ## every test; Apache Kafka is fetched and run if Java and Maven are there
	@$(BIN)/python $(if $(ARGS),-m pytest $(ARGS),-m tests.run_all)

chaos: setup  ## the long fault suite: kill -9 of workers and brokers under load, for an hour
	@for run in "exactly_once classic 20000 20" "exactly_once consumer 20000 20" "at_least_once classic 5000 6" \
		"at_least_once consumer 5000 6"; do \
		set -- $$run; echo "== $$1, group protocol $$2"; \
		$(BIN)/python -m tests.chaos --delivery $$1 --protocol $$2 --operations $$3 --minutes $$4 $(CHAOS_ARGS) || exit 1; done
	@$(BIN)/python -m pytest -m long
	@echo "== at_least_once, embedded broker"
	@$(BIN)/python -m tests.chaos --delivery at_least_once --broker embedded --operations 1000 --minutes 3 $(CHAOS_ARGS)

check: setup  ## lint, format, types, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

kafka: setup  ## a real Apache Kafka to play with, in the foreground
	@$(BIN)/python -m tests.apache_kafka $(or $(KAFKA_ARGS),--port 9092)

docs: setup  ## build the documentation into site/
	@$(BIN)/python -m pip install -q --disable-pip-version-check --group docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built: site/index.html"

bench: setup  ## the benchmarks, with their ratios
	@for name in import_time in_process launches produce_to_done recorder; do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:  ## remove .venv and what was built
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
