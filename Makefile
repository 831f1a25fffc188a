# make quickstart   train, export, verify and benchmark a real ERNIE classifier (15 minutes at most on 2 cores)
# make test         the default test suite (under 5 minutes)
# make venv         .venv from requirements.lock (both of the above do it first)
# make test-all     also the slow tests;  make lint: ruff and mypy;  make lock: resolve requirements.in again (needs uv)
# make serve-demo   serve the quickstart's model, or MODEL=ARTIFACT; ask it over HTTP and gRPC; stop
# make serve-exact serve-load serve-fuzz serve-kill serve-sigterm serve-soak MODEL=ARTIFACT DATA=dev.tsv
#                   measure the service on loopback (some minutes each; the last 31); figures go to docs/results/serving.json
# make docs         the documentation as a site, in output/site
# make native       build the native operator (docs/native.md);  make native-sanitize: its tests under ASan and UBSan
PYTHON ?= python3
BIN := .venv/bin

IN_PARALLEL := -n 2 --dist loadfile
SERVE_BENCHMARKS := serve-exact serve-load serve-fuzz serve-kill serve-sigterm serve-soak

.PHONY: venv quickstart test test-all lint lock docs clean native native-sanitize serve-demo $(SERVE_BENCHMARKS)

venv:
	@$(PYTHON) tools/make_venv.py

quickstart: venv
	$(BIN)/python tools/quickstart.py

test: venv
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

test-all: venv
	$(BIN)/python -m pytest $(IN_PARALLEL)

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

lock:
	uv pip compile --universal --python-version 3.9 --generate-hashes --no-header --quiet requirements.in -o requirements.lock
	uv pip compile --universal --python-version 3.9 --generate-hashes --no-header --quiet requirements-serving.in -o requirements-serving.lock
	for peer in openvino onnxruntime; do uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --quiet \
	  ernie_kqat/peers/$$peer.in -o ernie_kqat/peers/$$peer.lock; done

docs: venv
	$(BIN)/mkdocs build --quiet

native: venv
	$(BIN)/python tools/build_native.py

native-sanitize: venv
	$(BIN)/python -m pytest tests/test_native.py -k sanitizers

serve-demo: venv
	$(BIN)/python tools/serve_demo.py $(if $(MODEL),--model $(MODEL))

$(SERVE_BENCHMARKS): serve-%: venv
	$(BIN)/python tools/benchmarks/serving_$*.py --model $(or $(MODEL),$(error MODEL=ARTIFACT is missing)) --data $(or $(DATA),$(error DATA=TSV is missing))

clean:
	rm -rf .venv build dist *.egg-info
