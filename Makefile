# Each target makes .venv and installs what it needs the first time.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo lab test test-fast lint book bench weights results comparison clean

help:  ## this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3.12]'
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  %-12s %s\n", $$1, $$2}' \
		$(firstword $(MAKEFILE_LIST))

# The files that stand for what is installed.

.venv/installed: settings.ini setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

.venv/installed-notebook: .venv/installed
	$(BIN)/pip install --quiet --editable ".[notebook]"
	@touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/pip install --quiet --editable ".[bench]"
	@touch $@

# To use and to read.

demo: .venv/installed  ## the main job: train, guard, sample, count (two to three minutes of computing)
	$(BIN)/cpsample demo $(ARGS)

lab: .venv/installed-notebook  ## JupyterLab on the book
	$(BIN)/jupyter lab --notebook-dir nbs $(ARGS)

# To change and to check.

test-fast: .venv/installed-dev  ## the unit tests that are not slow: under 3 minutes
	$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

lint: .venv/installed-dev  ## style, format, fresh exports, and how readable the code is
	$(BIN)/ruff check .
	$(BIN)/ruff format --check nbs tools tests
	$(BIN)/python tools/book.py check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_measures.py

test: lint  ## everything that is asserted: lint, all unit tests, every notebook
	$(BIN)/python -m pytest -q
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print

book: .venv/installed-dev  ## run notebooks (all, or ARGS), export, README and map
	$(BIN)/python tools/book.py run $(ARGS)
	$(BIN)/python tools/book.py write

# To measure again.

bench: .venv/installed-bench  ## timings as ratios beside other libraries, into data/results
	$(BIN)/python tools/bench.py
	$(BIN)/python tools/threads.py

weights: .venv/installed-dev  ## train the shipped encoders again (make results: the other models)
	$(BIN)/python tools/weights.py

STUDIES = rejection guards predicted digits fashion judges paths membership audit guard_attacks paper \
	stable_diffusion caption_attacks prompt_detectors capacity

results: .venv/installed-dev  ## every number on file: minutes for the demo, ten hours for the rest
	$(BIN)/cpsample demo --seed 0 --seed 1 --seed 2 --rivals --json data/results/demo.json --out data/results
	for name in $(STUDIES); do \
		$(BIN)/cpsample reproduce $$name --out data/results || exit 1; \
		test $$name != fashion || $(BIN)/python tools/weights.py fashion_networks || exit 1; \
	done

comparison: .venv/installed-dev  ## every protection in one table: two to three hours, resumable
	$(BIN)/cpsample reproduce comparison --out data/results $(ARGS)

clean:  ## remove the environment and what was built, as far as make made it
	test ! -e .venv/installed || rm -rf .venv
	rm -rf build dist cpsample.egg-info
	rm -f cpsample-demo/demo.png
	test ! -d cpsample-demo || rmdir --ignore-fail-on-non-empty cpsample-demo
