# make quickstart   train, export, verify and benchmark a real ERNIE classifier (15 minutes at most on 2 cores)
# make test         the default test suite (under 5 minutes)
# make venv         .venv from requirements.lock (both of the above do it first)
# make test-all     also the slow tests;  make lint: ruff and mypy;  make lock: resolve requirements.in again (needs uv)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv quickstart test test-all lint lock clean

venv:
	@$(PYTHON) tools/make_venv.py

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
	rm -rf .venv build dist *.egg-info
