# make demo · make test · make lab · make bench · make comparison: each makes .venv and installs what it needs the first time.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: demo test lab bench book weights results comparison clean

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

demo: .venv/installed  ## the main job: train, guard, sample, count
	$(BIN)/cpsample demo $(ARGS)

test: .venv/installed-dev  ## lint, freshness, unit tests, every notebook
	$(BIN)/ruff check .
	$(BIN)/python tools/book.py check
	$(BIN)/python -m pytest -q
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print

lab: .venv/installed-notebook  ## JupyterLab on the book
	$(BIN)/jupyter lab --notebook-dir nbs $(ARGS)

.venv/installed-bench: .venv/installed
	$(BIN)/pip install --quiet --editable ".[bench]"
	@touch $@

bench: .venv/installed-bench  ## timings as ratios beside other libraries, into data/results/bench.json
	$(BIN)/python tools/bench.py

book: .venv/installed-dev  ## run every notebook, export the package, write the README
	$(BIN)/python tools/book.py run $(ARGS)
	$(BIN)/python tools/book.py write

weights: .venv/installed-dev  ## train the shipped encoders again (make results: the models of chapter 10)
	$(BIN)/python tools/weights.py

results: .venv/installed-dev  ## measure every number on file again: minutes for the demo, about six hours for the rest
	$(BIN)/cpsample demo --seed 0 --seed 1 --seed 2 --json data/results/demo.json --out data/results
	$(BIN)/python tools/rejection.py
	$(BIN)/python tools/guards.py
	$(BIN)/python tools/fashion.py choosing --n 1000
	$(BIN)/python tools/fashion.py reported
	$(BIN)/python tools/membership.py
	$(BIN)/python tools/audit.py
	$(BIN)/python tools/stable_diffusion.py

comparison: .venv/installed-dev  ## every protection in one table (resumable; two to three hours of one core), into data/results/comparison.json
	$(BIN)/python tools/comparison.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info cpsample-demo
