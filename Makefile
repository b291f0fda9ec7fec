# make demo    install, draw a small data set, train on it, evaluate, draw the predictions
# make test    install, then every test that needs no GPU
# make quick   the same without the slow ones
# make check   lint, types and tests: what a commit must pass

PY ?= $(shell command -v python3.11 || command -v python3)
RUN = .venv/bin/python
# Two workers of one thread each: most tests are too small for two threads.
test quick: export OMP_NUM_THREADS ?= 1
WORKERS ?= -n 2 --dist loadgroup --durations=20

.PHONY: demo test quick lint check env runtime

runtime:
	@$(PY) .ci/bootstrap.py --extras ""

env:
	@$(PY) .ci/bootstrap.py

demo: runtime
	$(RUN) -m vitdet.app.demo

test: env
	$(RUN) -m pytest $(WORKERS)

quick: env
	$(RUN) -m pytest $(WORKERS) -m "not slow and not nightly"

lint: env
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyright

check: lint test
