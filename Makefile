# Each target makes what it needs in .venv, once, and runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(abspath $(VENV))/bin
INSTALLED_FROM = pyproject.toml constraints.txt $(wildcard setup.py overtone/kernels/*.cpp)

.PHONY: demo test tables

demo: $(VENV)/lab.installed
	$(BIN)/overtone demo

test: $(VENV)/test.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

# The tables of README.md and docs/ again, from examples/results.
tables: $(VENV)/test.installed
	$(BIN)/python docs/tables.py

$(VENV)/%.installed: $(INSTALLED_FROM) | $(VENV)/bin/python
	$(BIN)/pip install -c constraints.txt -e ".[$*]"
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
