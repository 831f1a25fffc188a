# make quickstart   train, export, verify and benchmark a real ERNIE classifier (15 minutes at most on 2 cores)
# make test         the default test suite (under 5 minutes)
# make venv         .venv from requirements.lock (both of the above do it first)
# make test-all     also the slow tests;  make lint: ruff and mypy;  make lock: resolve requirements.in again (needs uv)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv quickstart test test-all lint lock clean

venv: $(VENV)/.installed

# Hashes are checked; --no-build-isolation is not needed because nothing but this package is built from source.
$(VENV)/.installed: requirements.lock setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 9) <= v <= (3, 11) else f"make PYTHON=python3.11 …: CPython 3.9, 3.10 or 3.11 is needed, this is {v[0]}.{v[1]}")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --require-hashes -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

quickstart: venv
	$(BIN)/python tools/quickstart.py

test: venv
	$(BIN)/python -m pytest -m "not slow"

test-all: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lock:
	uv pip compile --universal --python-version 3.9 --generate-hashes --no-header --quiet requirements.in -o requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info
