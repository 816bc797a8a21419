# Needs Python 3.10 or newer, git and make; every target but `gpu` installs the rest into .venv by itself.
# Options go through ARGS: make demo ARGS="book.txt --passes 2", make test ARGS="-k lookup".
# PEERS names folders, separated by colons, with checkouts or unpacked wheels of other packages to measure too.

PYTHON ?= python3
WORKERS ?= 2
OUT ?= gpu-results
MINUTES ?= 7
ONLY ?=
FULL ?=
DEVICE ?=
SECONDS ?= 60
PEERS ?=
BIN := .venv/bin
STAMP := .venv/.installed

# The test processes already share the cores; more threads in each would only get in each other's way.
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz mutations lint bench evaluate gpu clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## let the memory read a text and recall it
	$(BIN)/python -m fwpkm_kernels.demo $(ARGS)

test: $(STAMP) ## run the test suite without its slow cases
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP) ## run the slow cases: every kernel for every target, long interpreter runs
	$(PYTEST) -m slow $(ARGS)

fuzz: $(STAMP) ## run drawn cases for SECONDS= against the reference; ARGS="--op NAME --seed 1 --backend triton"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(ARGS)

mutations: $(STAMP) ## plant small faults one at a time: the tests must catch each
	$(BIN)/python -m tests.mutations --jobs $(WORKERS) $(ARGS)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## run the benchmarks
	$(if $(PEERS),FWPKM_PEERS="$(PEERS)") $(BIN)/python -m benchmarks.run $(ARGS)

# On a DEVICE it runs with the Python it is given, as `gpu` does.
evaluate: $(if $(DEVICE),,$(STAMP)) ## train models with and without a memory and measure them; FULL=1, DEVICE=cuda MINUTES=10
	$(if $(DEVICE),$(PYTHON),$(BIN)/python) -m benchmarks.evaluation.run $(if $(FULL),--full) \
		$(if $(DEVICE),--device $(DEVICE) --minutes $(MINUTES),--workers $(WORKERS)) $(ARGS)

# Straight from the checkout with the Python it is given: a GPU machine brings its own torch and may have no network.
gpu: ## time, test and check on a GPU, results in OUT=; ONLY=smoke|rows|tests|sanitizer|providers; installs nothing
	$(if $(PEERS),FWPKM_PEERS="$(PEERS)") $(PYTHON) -m benchmarks.gpu \
		--out "$(OUT)" --minutes $(MINUTES) $(if $(ONLY),--only $(ONLY)) $(ARGS)

clean: ## remove .venv, caches and build leftovers
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks fuzz-failures
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools comes first, by itself: pip's isolated builds would fetch one that no constraint pins.
# The stamp is touched last, so a set-up that was interrupted is taken up again.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,bench]'
	touch $(STAMP)
