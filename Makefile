# Two commands do everything: `make demo` and `make test`. Nothing is installed outside this folder.

UV := $(shell command -v uv 2>/dev/null || echo .tools/uv/bin/uv)
BIN := .venv/bin
PYTHON ?= python3

.PHONY: setup demo test accept soak lint bench format lock wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   the environment, in .venv"
	@echo "make demo    phantom slides -> training -> scores -> report (five minutes at most)"
	@echo "make test    the tests"
	@echo "make accept  the figures that are promised, at full size (minutes); they go to accept/"
	@echo "make soak    every fault of the table, and runs that are killed at random instants (for the night)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   what is claimed about speed, files and memory (ten minutes)"

setup: .venv/.done

.venv/.done: requirements.lock.txt pyproject.toml .python-version
	@test -x "$$(command -v $(UV))" || { $(PYTHON) -m venv .tools/uv && .tools/uv/bin/python -m pip install --quiet uv; }
	@test -d .venv || $(UV) venv --quiet .venv
	$(UV) pip install --quiet --python .venv --requirement requirements.lock.txt
	$(UV) pip install --quiet --python .venv --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/slideflow-ray demo --out demo-out

# Two processes; the tests of one file stay together, and so do all that share the local Ray (tests/conftest.py).
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

accept: setup
	$(BIN)/python -m pytest tests/accept -q -s

soak: setup
	$(BIN)/python -m pytest -m soak
	$(BIN)/python benchmarks/soak.py --kills 200
	$(BIN)/python benchmarks/soak.py --kills 20 --executor ray

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/end_to_end.py --ray
	$(BIN)/python benchmarks/aggregate.py --tiles 100000000
	$(BIN)/python benchmarks/crops.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/parts.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pins for everything, without the name of any host. Run it to move to newer versions.
lock:
	$(UV) pip compile pyproject.toml --group dev --no-annotate --no-header --python-version 3.12 --upgrade \
	  --output-file requirements.lock.txt --quiet

wheel: setup
	$(UV) build --quiet --out-dir dist

clean:
	rm -rf .venv .tools demo-out dist .pytest_cache .mypy_cache .ruff_cache
